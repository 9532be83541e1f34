"""A prompt from text to Graph JSON, which circuit-tracer's page and Neuronpedia read."""

import json
from pathlib import Path

import pytest
import torch
from clts import random_clt
from graphs import PROMPT, TOKENS, clt_of, model_of
from pydantic import BaseModel, ConfigDict

from sparseclt.graph.explain import agreement, prompt_graph
from sparseclt.graph.graph import Graph, Node
from sparseclt.graph.graph_json import graph_json, graph_name, write_graph
from sparseclt.graph.influence import Pruned
from sparseclt.graph.prompt import prompt_tokens
from sparseclt.graph.summary import graph_summary, strongest_paths

FEATURE_TYPES = {
    "cross layer transcoder", "lorsa", "mlp reconstruction error", "lorsa error", "embedding", "bias", "logit",
}  # fmt: skip


class Metadata(BaseModel):
    """Required by Neuronpedia's schema, or by circuit-tracer's model."""

    model_config = ConfigDict(strict=True)
    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float
    schema_version: int


class Saved(BaseModel):
    model_config = ConfigDict(strict=True)
    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: str
    clickedId: str
    sg_pos: str


class GraphNode(BaseModel):
    model_config = ConfigDict(strict=True)
    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    jsNodeId: str
    clerp: str
    token_prob: float
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    influence: float | None
    activation: float | None


class Link(BaseModel):
    model_config = ConfigDict(strict=True)
    source: str
    target: str
    weight: float


class GraphFile(BaseModel):
    model_config = ConfigDict(strict=True)
    metadata: Metadata
    qParams: Saved
    nodes: list[GraphNode]
    links: list[Link]


def explained(attention="frozen", **options):
    return prompt_graph(clt_of("gpt2", attention), model_of("gpt2"), PROMPT, **options)


@pytest.mark.parametrize("error_nodes", [False, True])
@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_graph_json_has_the_fields_and_types_that_others_read(attention, error_nodes):
    prompt = explained(attention, error_nodes=error_nodes)
    file = GraphFile.model_validate(json.loads(json.dumps(graph_json(prompt), allow_nan=False)))
    ids = [node.node_id for node in file.nodes]
    assert len(set(ids)) == len(ids) and len({node.jsNodeId for node in file.nodes if "logit" in node.feature_type})
    assert {link.source for link in file.links} | {link.target for link in file.links} <= set(ids)
    assert {node.feature_type for node in file.nodes} <= FEATURE_TYPES
    assert file.metadata.prompt_tokens == ["<s>", "w7", "w31", "w7", "w12", "w3", "w44"]
    kept = prompt.pruned
    assert (len(file.nodes), len(file.links)) == (int(kept.nodes.sum()), int(kept.edges.sum()))
    by_weight = {(link.source, link.target): link.weight for link in file.links}
    assert len(by_weight) == len(file.links)


def test_nodes_are_named_as_circuit_tracer_names_them():
    nodes = {node["node_id"]: node for node in graph_json(explained())["nodes"]}
    embedding = nodes["E_44_6"]
    assert (embedding["layer"], embedding["feature"], embedding["jsNodeId"]) == ("E", 6, "E_44-6")
    latent = next(n for n in nodes.values() if n["feature_type"] == "cross layer transcoder" and n["layer"] == "1")
    j, position = latent["latent"], latent["ctx_idx"]
    assert latent["node_id"] == f"1_{j}_{position}" and latent["jsNodeId"] == f"1_{j}-0"
    assert latent["feature"] == (1 + j) * (2 + j) // 2 + j and latent["site"] == "mlp_1"
    target = [n for n in nodes.values() if n["is_target_logit"]]
    assert len(target) == 1 and target[0]["node_id"] == f"4_{target[0]['feature']}_6"
    assert target[0]["clerp"] == f'Output "w{target[0]["feature"]}" (p={target[0]["token_prob"]:.3f})'


def test_a_written_graph_is_listed_once_in_the_index(tmp_path):
    first = explained()
    path = write_graph(first, tmp_path / "graphs" / f"{graph_name(first)}.json")
    write_graph(first, path)
    write_graph(first, path.with_name("other.json"))
    index = json.loads((path.parent / "graph-metadata.json").read_text())["graphs"]
    assert [entry["slug"] for entry in index] == [path.stem, "other"]
    assert json.loads(path.read_text())["metadata"] == index[0]
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([path.name, "other.json", "graph-metadata.json"])


@pytest.mark.parametrize("name", ["graph.txt", "graph-metadata.json"])
def test_a_file_that_is_no_graph_is_not_written(tmp_path, name):
    with pytest.raises(ValueError, match="out: expected a file named NAME.json"):
        write_graph(explained(), tmp_path / name)


def test_the_summary_has_the_measurements_and_the_paths():
    text = graph_summary(explained(error_nodes=True))
    for part in ("nodes kept", "edges kept", "KL divergence", "replacement", "frozen attention", "Strongest paths"):
        assert part in text


def test_the_strongest_paths_are_those_of_a_graph_that_can_be_enumerated():
    nodes = (
        *(Node("latent", 0, 0), Node("latent", 0, 1)),
        *(Node("embedding", 0), Node("embedding", 1), Node("bias", 0), Node("logit", 1, 3)),
    )
    edges = [(2, 0, 2.0), (3, 0, -1.0), (0, 1, 3.0), (2, 1, 1.0), (4, 1, 9.0), (0, 5, 0.5), (1, 5, -2.0), (3, 5, 0.1)]
    source, target, coefficient = (torch.tensor(column) for column in zip(*edges, strict=True))
    stage, values = torch.tensor([0, 1, -1, -1, -1, 2]), torch.ones(6).double()
    graph = Graph(torch.tensor([1, 2]), nodes, values, source, target, coefficient.double(), stage, torch.ones(1))
    everything = Pruned(torch.ones(6, dtype=torch.bool), torch.ones(len(edges), dtype=torch.bool), values)
    paths = [(path.nodes, path.contribution) for path in strongest_paths(graph, everything, 5, most=4)]
    assert paths == [((2, 0, 1, 5), -12.0), ((3, 0, 1, 5), 6.0), ((2, 1, 5), -2.0), ((2, 0, 5), 1.0)]


def test_agreement_is_the_kl_divergence_and_the_share_of_equal_top_tokens():
    real, sparse = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
    ours = agreement(real, sparse)
    kl = torch.nn.functional.kl_div(sparse.log_softmax(-1), real.softmax(-1), reduction="none").sum(-1)
    assert ours.kl_last == pytest.approx(kl[-1].item(), rel=1e-5)
    assert ours.kl_mean == pytest.approx(kl[1:].mean().item(), rel=1e-5)
    assert ours.top1_mean == (real.argmax(-1) == sparse.argmax(-1))[1:].double().mean()
    same = agreement(real, real)
    assert (same.kl_last, same.kl_mean, same.top1_last, same.top1_mean) == (0, 0, True, 1)


def test_a_prompt_begins_as_a_document_does():
    assert torch.equal(prompt_tokens(model_of("gpt2"), PROMPT), TOKENS)
    assert torch.equal(prompt_tokens(model_of("gpt2"), f"<s> {PROMPT}", special_tokens=True), TOKENS)


def test_special_tokens_are_plain_text_unless_asked_for():
    from sparseclt.language_model.language_model import LanguageModel

    model = LanguageModel.load("embedded")
    plain, special = (prompt_tokens(model, "<|endoftext|> of", special_tokens=s)[0].tolist() for s in (False, True))
    start = model.tokenizer.eos_token_id
    assert plain.count(start) == 1 and len(plain) > 5
    assert special == [start, *model.tokenizer(" of").input_ids]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: expected some text, got ''"),
        (" \n", "prompt: expected some text"),
        ("w1 " * 24, r"prompt: expected at most 24 tokens \(the model's context\).*got 25"),
    ],
)
def test_a_prompt_without_text_or_too_long_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        prompt_graph(clt_of("gpt2", "frozen"), model_of("gpt2"), prompt)


def test_a_clt_without_connections_has_a_graph_of_vanilla_mode_only(tmp_path):
    clt, model = random_clt(model_of("gpt2")), model_of("gpt2")
    with pytest.raises(ValueError, match="clt: expected a CLT with connections.*trace mode 'vanilla'"):
        prompt_graph(clt, model, PROMPT)
    traced = prompt_graph(clt, model, PROMPT, mode="vanilla")
    assert graph_name(traced).endswith("-vanilla")
    written = json.loads(write_graph(traced, tmp_path / "graph.json").read_text())
    assert written["metadata"]["sparseclt"]["mode"] == "vanilla"
    assert "Graph of the replaced model, vanilla mode" in graph_summary(traced)
    with_errors = prompt_graph(clt, model, PROMPT, mode="vanilla", error_nodes=True)
    real = model.replaced_logits(TOKENS)[0, -1]
    assert with_errors.graph.probabilities[0] == pytest.approx(real.softmax(-1).max().item())


def test_a_prompt_of_the_first_token_only_is_refused():
    with pytest.raises(ValueError, match="prompt: expected text behind the token that begins a document"):
        prompt_graph(clt_of("gpt2", "frozen"), model_of("gpt2"), "<s>", special_tokens=True)


def test_half_precision_is_refused():
    clt = random_clt(model_of("gpt2")).bfloat16()
    with pytest.raises(ValueError, match="clt: expected float32 or float64, in which a graph is exact, got torch.bf"):
        prompt_graph(clt, model_of("gpt2"), PROMPT)


def test_a_prompt_of_one_word_has_a_graph():
    short = prompt_graph(clt_of("gpt2", "frozen"), model_of("gpt2"), "w5")
    assert len(short.graph.tokens) == 2 and graph_json(short)["links"]


def test_a_graph_keeps_text_as_it_is():
    prompt = prompt_graph(clt_of("gpt2", "frozen"), model_of("gpt2"), "w1 <script>alert(1)</script>")
    assert json.loads(json.dumps(graph_json(prompt)))["metadata"]["prompt"] == "w1 <script>alert(1)</script>"
    assert Path(graph_name(prompt)).name.startswith("w1-script-alert-1-script-")
