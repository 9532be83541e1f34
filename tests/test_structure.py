"""The house: floors that import only downward, and rooms whose private names stay inside."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 300  # lines


def lint(folder: Path) -> subprocess.CompletedProcess:
    code = "from importlinter.cli import lint_imports_command as main; main()"
    command = [sys.executable, "-c", code, "--no-cache"]
    return subprocess.run(command, cwd=folder, env={"PYTHONPATH": str(folder)}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("house")
    for package in ("sparseclt", "csrc_triton"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "data"))
    shutil.copytree(ROOT / "sparseclt" / "data", folder / "sparseclt" / "data")
    shutil.copy(ROOT / ".importlinter", folder)
    return folder


@pytest.mark.parametrize(
    ("file", "arrow"),
    [
        ("sparseclt/ops/rows.py", "from sparseclt.model.sites import Site"),
        ("sparseclt/model/sites.py", "def late():\n    from sparseclt.model.clt import SparseCLT"),
        ("sparseclt/data/text.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sparseclt.runs"),
        ("csrc_triton/launch.py", "import sparseclt.config"),
        ("sparseclt/storage/directories.py", "import sparseclt.storage.checkpoint"),
    ],
    ids=["upward", "late", "for types only", "out of the kernels", "a circle in a room"],
)
def test_one_arrow_turned_is_noticed(copy, file, arrow):
    pytest.importorskip("importlinter", reason="import-linter is part of the extra dev")
    own = (copy / file).read_text()
    try:
        (copy / file).write_text(f"{own}\n\n{arrow}\n")
        done = lint(copy)
    finally:
        (copy / file).write_text(own)
    assert done.returncode == 1 and "BROKEN" in done.stdout, done.stdout + done.stderr


def test_as_it_stands_every_contract_is_kept(copy):
    pytest.importorskip("importlinter", reason="import-linter is part of the extra dev")
    done = lint(copy)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


def private_names_of_ops(file: Path) -> list[str]:
    """What a file imports of `sparseclt.ops` by a name that begins with an underscore."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparseclt.ops"):
            parts = [*str(node.module).split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            parts = [p for a in node.names if a.name.startswith("sparseclt.ops") for p in a.name.split(".")]
        else:
            continue
        found += [part for part in parts if part.startswith("_")]
    return found


def test_nobody_outside_ops_imports_a_private_name_of_it():
    files = [f for folder in ("sparseclt", "benchmarks", "tools") for f in (ROOT / folder).rglob("*.py")]
    outside = [f for f in files if ROOT / "sparseclt" / "ops" not in f.parents]
    assert len(outside) > 50
    assert {str(f.relative_to(ROOT)): names for f in outside if (names := private_names_of_ops(f))} == {}
    assert private_names_of_ops(ROOT / "sparseclt" / "ops" / "_numba.py")  # the check sees what it should


def test_no_file_is_longer_than_300_lines():
    folders = ("sparseclt", "csrc_triton", "benchmarks", "tools")
    lengths = {f: len(f.read_text().splitlines()) for folder in folders for f in (ROOT / folder).rglob("*.py")}
    assert {f.name: n for f, n in lengths.items() if n > LONGEST} == {}
