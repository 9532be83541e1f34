"""What pip installs: the wheel holds the package and nothing else, and without extras the ops run on torch only."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sparseclt

ROOT = Path(__file__).parents[1]
GENERATED = ("build", "runs", "site", "caches")


def run(*command: object, **options) -> subprocess.CompletedProcess:
    """A process that sees nothing of this checkout through PYTHONPATH."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, **options)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Sdist and wheel, the wheel built from the sdist; of a copy, because builds leave files beside the source."""
    source, out = tmp_path_factory.mktemp("source") / "sparseclt", tmp_path_factory.mktemp("dist")
    everywhere = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
    shutil.copytree(
        ROOT, source, ignore=lambda at, names: {*everywhere(at, names), *(GENERATED if Path(at) == ROOT else ())}
    )
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def with_requirements(name: str) -> set[str]:
    """A distribution and, transitively, those it requires without extras."""
    found, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            wanted = [Requirement(line) for line in distribution(name).requires or ()]
            todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare(built, tmp_path_factory):
    """The interpreter of a new environment: the wheel, torch and what torch requires. Torch is linked, not copied."""
    home = tmp_path_factory.mktemp("bare")
    packages = home / "torch_only"
    packages.mkdir()
    for name in with_requirements("torch"):
        for top in {file.parts[0] for file in distribution(name).files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(distribution(name).locate_file(top))
    assert run(sys.executable, "-m", "venv", "--without-pip", home / "venv").returncode == 0
    python = home / "venv/bin/python"
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", built[1])
    assert done.returncode == 0, done.stderr
    (site,) = (home / "venv/lib").glob("python*/site-packages")
    (site / "torch_only.pth").write_text(f"{packages}\n")
    return python


def without_extras(python: Path, *arguments: str) -> subprocess.CompletedProcess:
    return run(python, *arguments, cwd=python.parent)


def test_the_wheel_requires_torch_only_and_holds_the_packages_only(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
        metadata = message_from_bytes(wheel.read(next(name for name in names if name.endswith("METADATA"))))
    requires = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert [r.name for r in requires if "extra" not in str(r.marker or "")] == ["torch"]
    assert metadata["Version"] == sparseclt.__version__
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"sparseclt", "csrc_triton"}
    assert {"sparseclt/py.typed", "sparseclt/embedded/data/model/model.safetensors"} < set(names)
    modules = {str(f.relative_to(ROOT)) for top in ("sparseclt", "csrc_triton") for f in (ROOT / top).rglob("*.py")}
    assert modules == {name for name in names if name.endswith(".py")}


def test_triton_is_not_pinned_above_3_6(built):
    with zipfile.ZipFile(built[1]) as wheel:
        metadata = message_from_bytes(wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))))
    requires = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    (triton,) = [r for r in requires if r.name == "triton"]
    assert "3.6.0" in triton.specifier and "4.0" in triton.specifier


def test_the_sdist_has_what_a_build_needs(built):
    with tarfile.open(built[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "sparseclt/embedded/data/train.jsonl.gz"} < names


def test_the_readme_op_runs_without_extras(bare):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (code,) = [block for block in blocks if "topk_encode" in block]
    code += "\nsae, x = TopKSAE(16, 64, 8), torch.randn(32, 16)\nsae(x).square().mean().backward()\n"
    code += "print(tuple(sae.W_enc.grad.shape), [n for n in ('numpy', 'pydantic') if n in __import__('sys').modules])"
    done = without_extras(bare, "-c", code)
    assert (done.returncode, done.stdout) == (0, "(64, 16) []\n"), done.stderr


@pytest.mark.parametrize("name", sparseclt.__all__)
def test_public_names_exist(name):
    assert getattr(sparseclt, name).__name__ == name and name in dir(sparseclt)


def test_a_missing_extra_is_named(bare):
    done = without_extras(bare, "-c", "from sparseclt import Trainer")
    assert done.returncode == 1
    expected = r"ImportError: sparseclt\.Trainer needs \w+, which is not installed: pip install 'sparseclt\[train\]'"
    assert re.fullmatch(expected, done.stderr.splitlines()[-1]), done.stderr


def test_the_command_names_the_missing_extra(bare):
    for command in ([bare.parent / "sparseclt"], [bare, "-m", "sparseclt", "train", "--help"]):
        done = run(*command, cwd=bare.parent)
        assert (done.returncode, done.stdout) == (2, "")
        expected = r"sparseclt: the sparseclt command needs \w+, .*: pip install 'sparseclt\[train\]'\n"
        assert re.fullmatch(expected, done.stderr), done.stderr


def test_a_missing_module_of_our_own_is_not_blamed_on_an_extra():
    from sparseclt.extras import missing_extra

    error = ModuleNotFoundError("No module named 'sparseclt.nonesuch'", name="sparseclt.nonesuch")
    assert missing_extra("sparseclt.Trainer", error) is error
