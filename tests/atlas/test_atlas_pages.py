"""The pages in a real browser: they open without an error, lead to one another, and keep text as text."""

import os
import random
import shutil
from pathlib import Path

import pytest
from atlases import DEAD, IMAGE, NAME, SCRIPT, SCRIPT_ID
from browser import Pages, served

from sparseclt.atlas.build import build_atlas
from sparseclt.atlas.folder import read, write

SIZES = {"desktop": (1200, 900), "phone": (400, 800)}


@pytest.fixture(scope="module")
def url(atlas):
    with served(atlas.folder) as url:
        yield url


@pytest.fixture
def pages(browser, url):
    page = browser.new_page()
    pages = Pages(page, url)
    yield pages
    page.close()
    assert pages.troubles == []


@pytest.fixture
def lively(atlas):
    """A latent of the last module with examples, connections and contributions."""
    shard = read(atlas.folder / "data" / "latents" / "2" / "0.json.gz")
    i = max(range(len(shard)), key=lambda i: shard[i]["modes"]["sparse"]["fired"])
    return i, shard[i]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_page_opens_without_errors_and_fits(browser, url, size, scheme):
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    pages = Pages(page, url)
    hashes = [
        "#/",
        "#/modules",
        "#/module/mlp_0",
        "#/module/mlp_1/frequency-sparse",
        f"#/latent/mlp_{DEAD[0]}/{DEAD[1]}",
    ]
    hashes += [
        "#/latent/mlp_2/0",
        "#/latent/mlp_2/1/vanilla",
        "#/search/w1",
        "#/token/9",
        "#/nowhere",
        "#/latent/mlp_9/1",
        "#/graphs",
        "#/graph/tiny",
    ]
    for hash in hashes:
        pages.open(hash)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, hash
        assert len(page.query_selector_all("h1")) == 1, hash
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    page.close()
    assert pages.troubles == []


def test_a_token_a_latent_an_upstream_connection_and_back(pages, lively):
    i, data = lively
    page, here = pages.page, f"#/latent/mlp_2/{i}"
    pages.open(here)
    strongest = max(
        (c for c in range(6) if data["upstream"]["latent"][c] >= 0), key=lambda c: abs(data["upstream"]["mean"][c])
    )
    m, j = divmod(data["upstream"]["latent"][strongest], 20)
    page.click("#upstream tbody tr:first-child a")
    pages.shows(f"#/latent/mlp_{m}/{j}")
    assert f"mlp_{m}/{j}" in pages.text("h1")
    down = page.query_selector_all(f'#downstream a[href="{here}"]')
    assert len(down) == 1
    page.go_back()
    pages.shows(here)
    token = page.get_attribute("#examples .text a", "href")
    page.click("#examples .text a")
    pages.shows(token)
    page.click('main a[href^="#/latent/"]')
    page.wait_for_function("() => document.body.dataset.page.startsWith('#/latent/')")
    page.go_back()
    pages.shows(token)
    page.go_back()
    pages.shows(here)


def test_the_page_shows_the_numbers_of_the_data(pages, lively):
    i, data = lively
    pages.open(f"#/latent/mlp_2/{i}")

    def numbers(selector):
        return [float(d.get_attribute("value")) for d in pages.page.query_selector_all(f"{selector} data")]

    sparse = data["modes"]["sparse"]
    assert numbers("#activity tbody tr:nth-child(2)")[1:] == [sparse["fired"], sparse["mean"], sparse["largest"]]
    up = data["upstream"]
    open_slots = [c for c in range(6) if up["latent"][c] >= 0]
    shown = numbers("#upstream")
    for c in open_slots:
        assert [up["V"][c], up["mean"][c], up["together"][c]] in [shown[n : n + 3] for n in range(0, len(shown), 3)]
    assert len(shown) == 3 * len(open_slots)
    entry = data["logits"][0]
    assert numbers("#logits")[0::2] == entry["top_values"] and numbers("#logits")[1::2] == entry["bottom_values"]
    tokens = pages.page.query_selector_all("#examples .example:nth-child(1 of .example) .text a")
    values = [float(t.get_attribute("data-value") or 0) for t in tokens]
    assert values == sparse["examples"][0]["values"]
    pages.page.click("#examples details summary")
    parts = numbers("#examples details[open]")
    assert abs(sum(parts) - sparse["examples"][0]["value"]) < 1e-5 * max(1, *map(abs, parts))


def test_modes_and_keys(pages, lively):
    i, _ = lively
    page = pages.page
    pages.open("#/latent/mlp_2/5")
    for key, hash in [
        ("j", "#/latent/mlp_2/6"), ("ArrowRight", "#/latent/mlp_2/7"), ("k", "#/latent/mlp_2/6"),
        ("m", "#/latent/mlp_2/6/vanilla"), ("j", "#/latent/mlp_2/7/vanilla"), ("u", "#/module/mlp_2"),
        ("k", "#/module/mlp_1"), ("u", "#/modules"), ("u", "#/"),
    ]:  # fmt: skip
        page.keyboard.press(key)
        pages.shows(hash)
    page.keyboard.press("?")
    assert page.is_visible("#keys")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("mlp_1/4")
    page.keyboard.press("Enter")
    pages.shows("#/latent/mlp_1/4")


def test_search_finds_tokens_and_their_latents(pages):
    pages.open("#/")
    pages.page.fill("#query", "w12")
    pages.page.press("#query", "Enter")
    pages.shows("#/search/w12")
    pages.page.click("#found a")
    pages.shows("#/token/12")
    assert "w12" in pages.text("h1") and "mlp_" in pages.text()
    pages.open("#/search/no%20such%20token")
    assert "No token has that text" in pages.text()


def test_markup_in_the_text_stays_text(pages, atlas):
    page = pages.page
    for hash in (
        "#/",
        f"#/token/{SCRIPT_ID}",
        "#/search/%3Cscript%3E",
        "#/search/%3Cimg%20src=x%20onerror=window.hacked=1%3E",
    ):
        pages.open(hash)
        assert page.evaluate("window.hacked") is None
        assert page.query_selector_all("main script, main img, main b") == []
    assert SCRIPT in pages.text("body") or IMAGE in pages.text("body")
    shown = set()
    for i in range(20):
        pages.open(f"#/latent/mlp_2/{i}")
        shown |= {text for text in (SCRIPT, IMAGE) if text in pages.text("#examples")}
        assert page.query_selector_all("main script, main img") == []
        if len(shown) == 2:
            break
    assert shown == {SCRIPT, IMAGE} and page.evaluate("window.hacked") is None
    assert NAME in page.title()


def test_a_dead_latent_says_so(pages):
    pages.open(f"#/latent/mlp_{DEAD[0]}/{DEAD[1]}")
    assert "fired on none of the 760 tokens in either mode" in pages.text("#dead")


def test_a_graph_leads_to_latents_and_keeps_pins_and_supernodes_in_its_address(pages):
    page = pages.page
    pages.open("#/graphs")
    page.click("#prompts a")
    page.wait_for_selector("#picture [data-node]")
    assert page.locator("#picture [data-node]").count() == 4
    assert "0.875" in pages.text("#faith") and SCRIPT in pages.text("main")
    page.click('[data-node="0_4_2"]')
    assert "Inputs (1)" in pages.text("#node") and "Outputs (2)" in pages.text("#node")
    weights = [float(d.get_attribute("value")) for d in page.query_selector_all("#node table data")]
    assert weights == [1.25, 2.0, -0.75]
    page.click("#pin")
    page.click('[data-node="1_5_2"]', modifiers=["Shift"])
    for box in page.query_selector_all("#pins input[type=checkbox]"):
        box.check()
    page.fill("#label", "both")
    page.click("#group")
    address = page.url
    page.reload()
    page.wait_for_selector("#subgraph")
    assert page.url == address and "both" in pages.text("#pins")
    assert {"clicked", "pinned"} <= set(page.get_attribute('[data-node="0_4_2"]', "class").split())
    page.locator("input[type=range]").fill("0.6")
    assert page.locator("#picture [data-node]").count() == 3  # the pinned ones, and the logit
    page.click("#to-latent")
    pages.shows("#/latent/mlp_0/4/sparse")
    page.go_back()
    page.wait_for_selector("#subgraph")


def large(source: Path, folder: Path, modules: int, latents: int) -> None:
    """An atlas of `modules` x `latents` latents, as far as the pages below ask for it."""
    shutil.copytree(source, folder)
    data, generator = folder / "data", random.Random(0)
    run, first = read(data / "run.json.gz"), read(data / "modules" / "0.json.gz")
    run |= {
        "latents": latents,
        "modules": [run["modules"][0] | {"name": f"mlp_{m}", "layer": m} for m in range(modules)],
    }
    run["flow"] = [[abs(generator.gauss(0, 1)) for _ in range(modules)] for _ in range(modules)]
    write(data / "run.json.gz", run)
    many = {
        name: {mode: [values[i % 20] for i in range(latents)] for mode, values in first[name].items()}
        for name in first
        if name != "downstream"
    }
    write(data / "modules" / "0.json.gz", many | {"downstream": list(range(latents))})
    some = read(data / "latents" / "0" / "0.json.gz")
    write(data / "latents" / "0" / f"{(latents - 1) // run['shard']}.json.gz", (some * 4)[: run["shard"]])
    texts = [f"token{i}" for i in range(50_000)]
    write(data / "vocabulary.json.gz", {"texts": texts, "counts": [1] * len(texts)})


def test_196608_latents_open_in_under_a_second(browser, atlas, tmp_path):
    """Seconds of the page's own process, its start included: those on the clock depend on what else runs."""
    large(atlas.folder, tmp_path / "large", modules=12, latents=16_384)
    with served(tmp_path / "large") as url:
        for hash in ("#/", "#/modules", "#/module/mlp_0", "#/latent/mlp_0/16383", "#/search/token7"):
            page = browser.new_page()
            pages, session = Pages(page, url), page.context.new_cdp_session(page)
            session.send("Performance.enable")
            pages.open(hash)
            metrics = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
            page.close()
            assert pages.troubles == [] and 0 < metrics["ProcessTime"] < 1, hash


@pytest.mark.skipif("SPARSECLT_PICTURES" not in os.environ, reason="makes the pictures of docs/atlas.md: see there")
def test_pictures_for_the_documentation(browser):
    run, folder = Path(os.environ["SPARSECLT_PICTURES"]), Path(__file__).parents[2] / "docs" / "images"
    names = os.environ.get("SPARSECLT_PICTURE_NAMES", "atlas")  # what the files' names begin with
    latent, graph = os.environ["SPARSECLT_PICTURED"].split()
    with served(build_atlas(run)) as url:
        for name, hash, scheme, (width, height) in [
            ("overview", "#/", "light", (1100, 760)),
            ("latent", f"#/latent/{latent}", "light", (1100, 900)),
            ("phone", f"#/latent/{latent}", "dark", (400, 800)),
            ("graph", f"#/graph/{graph}", "light", (1100, 900)),
        ]:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            pages = Pages(page, url)
            page.goto(url + hash)
            page.wait_for_selector("h1")
            if name == "graph":
                page.locator("#picture .mark circle").last.click()
            page.screenshot(path=folder / f"{names}-{name}.png")
            page.close()
            assert pages.troubles == []
