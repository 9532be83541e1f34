"""The graph of a real prompt in a real browser: its nodes, its edges, its pins, its latents."""

import json
import shutil

import pytest
from atlases import SCRIPT
from browser import Pages, served

from sparseclt.atlas.build import add_graphs
from sparseclt.graph.explain import prompt_graph
from sparseclt.graph.graph_json import write_graph

PROMPT = f"w5 w9 {SCRIPT} w12 w5"


@pytest.fixture(scope="module")
def graphs(atlas, tmp_path_factory):
    """A copy of the atlas with the graph of PROMPT in each mode, and these graphs as plain values."""
    folder = tmp_path_factory.mktemp("graphs")
    shutil.copytree(atlas.folder, folder / "pages")
    for mode in ("sparse", "vanilla"):
        traced = prompt_graph(atlas.clt, atlas.language_model, PROMPT, mode=mode)
        write_graph(traced, folder / "graphs" / f"{mode}.json")
    add_graphs(folder / "graphs", folder / "pages")
    return folder / "pages", {
        m: json.loads((folder / "graphs" / f"{m}.json").read_text()) for m in ("sparse", "vanilla")
    }


@pytest.mark.parametrize("mode", ["sparse", "vanilla"])
def test_a_prompts_graph_is_shown_with_its_own_nodes_and_weights(browser, graphs, mode):
    folder, written = graphs[0], graphs[1][mode]
    nodes, links = written["nodes"], written["links"]
    with served(folder) as url:
        page = browser.new_page()
        pages = Pages(page, url)
        page.goto(f"{url}#/graph/{mode}")
        page.wait_for_selector("#picture [data-node]")
        assert page.locator("#picture [data-node]").count() == len(nodes)
        assert {n["feature_type"] for n in nodes} >= {
            "cross layer transcoder",
            "embedding",
            "lorsa error",
            "logit",
            "bias",
        }
        latents = [n for n in nodes if "latent" in n]
        busiest = max(latents, key=lambda n: sum(n["node_id"] in link.values() for link in links))
        page.locator(f'[data-node="{busiest["node_id"]}"]').dispatch_event("click")
        shown = sorted(float(d.get_attribute("value")) for d in page.query_selector_all("#node table data"))
        own = sorted(link["weight"] for link in links if busiest["node_id"] in (link["source"], link["target"]))
        assert shown == pytest.approx(own) and len(own) > 2
        page.click("#pin")
        other = next(n for n in latents if n is not busiest)
        page.locator(f'[data-node="{other["node_id"]}"]').dispatch_event("click", {"shiftKey": True})
        for box in page.query_selector_all("#pins input[type=checkbox]"):
            box.check()
        page.fill("#label", "group")
        page.click("#group")
        address = page.url
        page.reload()
        page.wait_for_selector("#subgraph")
        assert page.url == address and "group" in pages.text("#pins")
        assert f"{written['metadata']['sparseclt']['scores']['completeness']:.3f}"[:4] in pages.text("#faith")
        page.click("#to-latent")
        pages.shows(f"#/latent/{busiest['site']}/{busiest['latent']}/{mode}")
        assert page.evaluate("window.hacked") is None and pages.troubles == []
        page.close()
