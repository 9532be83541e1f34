"""Graphs of a run are taken into its atlas; a file that is none is named."""

import json

import pytest
from atlases import graph_json

from sparseclt.atlas.folder import read
from sparseclt.atlas.graphs import copy_graphs


def test_graphs_are_copied_and_listed(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(graph_json()))
    (tmp_path / "graph-metadata.json").write_text("{}")
    assert copy_graphs(tmp_path, tmp_path / "data") == 1
    assert read(tmp_path / "data" / "graphs" / "tiny.json.gz") == graph_json()
    listed = read(tmp_path / "data" / "graphs.json.gz")
    assert [(g["slug"], g["nodes"], g["edges"]) for g in listed] == [("tiny", 4, 4)]


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"nodes": [], "links": [], "metadata": {"prompt": 1, "prompt_tokens": []}}']
)
def test_a_file_that_is_no_graph_is_named(tmp_path, text):
    (tmp_path / "wrong.json").write_text(text)
    with pytest.raises(ValueError, match="graphs: expected Graph JSON in .*wrong.json"):
        copy_graphs(tmp_path, tmp_path / "data")


def test_a_link_to_no_node_is_refused(tmp_path):
    graph = graph_json()
    graph["links"][0]["target"] = "9_9_9"
    (tmp_path / "wrong.json").write_text(json.dumps(graph))
    with pytest.raises(ValueError, match="links to no node"):
        copy_graphs(tmp_path, tmp_path / "data")


def test_no_graphs_are_no_error(tmp_path):
    assert copy_graphs(tmp_path / "absent", tmp_path / "data") == 0
