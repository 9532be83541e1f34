"""The documentation names what exists."""

import re
import tomllib
from pathlib import Path

import pytest

import sparseclt
from sparseclt import ops

ROOT = Path(__file__).parents[1]
WALKS = {"From an op to its kernel": 5, "From a batch to the optimiser": 10}


def read(name):
    return (ROOT / name).read_text()


@pytest.mark.parametrize("title", WALKS)
def test_a_walk_is_short_and_names_what_exists(title):
    text = read("CONTRIBUTING.md").split(f"{title}:\n\n")[1].split("\n\n")[0]
    steps = re.findall(r"^\d+\. `([\w/.]+)`(?:, `(\w+)`)?: ", text, re.M)
    assert len(steps) == len(text.splitlines()) <= WALKS[title]
    for file, name in steps:
        assert (ROOT / file).exists(), file
        if name:
            assert re.search(rf"^\s*(def|class) {name}\b", read(file), re.M), f"{name} in {file}"


def test_the_reference_lists_every_public_name():
    listed = re.findall(r"^::: ([\w.]+)$", read("docs/reference/sparseclt.md") + read("docs/reference/ops.md"), re.M)
    assert {f"sparseclt.{name}" for name in sparseclt.__all__} == {n for n in listed if n.count(".") == 1}
    assert set(ops.__all__) == {n.split(".")[-1] for n in listed if n.startswith("sparseclt.ops.")}


def test_every_page_is_in_the_navigation():
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages == set(re.findall(r": ([\w/-]+\.md)$", read("mkdocs.yml"), re.M))


def test_one_version_is_stated_everywhere():
    assert f"\nversion: {sparseclt.__version__}\n" in read("CITATION.cff")
    assert re.search(r"^## ([\d.]+)", read("CHANGELOG.md"), re.M)[1] == sparseclt.__version__


def test_constraints_pin_what_make_installs_by_name():
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in read("constraints.txt").splitlines()}
    project = tomllib.loads(read("pyproject.toml"))["project"]
    wanted = [r for group in project["optional-dependencies"].values() for r in group] + project["dependencies"]
    names = {re.match(r"[\w-]+", r)[0].lower() for r in wanted} - {"sparseclt"}
    assert names <= pinned


def test_the_readme_fits_a_screen_and_counts_test_functions():
    readme = read("README.md")
    assert len(readme.splitlines()) <= 70
    quoted = int(re.search(r"more than (\d+) test functions", readme)[1])
    files = (ROOT / "tests").rglob("test_*.py")
    functions = sum(len(re.findall(r"^\s*def test_", file.read_text(), re.M)) for file in files)
    assert quoted < functions < 1.25 * quoted


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md"))),
]


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    text = read(page)
    named = set(re.findall(r"\b(?:sparseclt|csrc_triton|benchmarks|tests|tools)/[\w/]+\.py\b", text))
    if page == "docs/method.md":
        named |= {f"sparseclt/{file}" for file in re.findall(r"`(model/\w+\.py)`", text)}
    assert not [file for file in sorted(named) if "NAME" not in file and not (ROOT / file).exists()]
