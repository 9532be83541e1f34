import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "csrc_triton"

USE = """
import torch
from vendored import sparse_decode
device = "cuda" if torch.cuda.is_available() else "cpu"
values, indices, W = torch.ones(2, 1), torch.tensor([[1], [0]]), torch.arange(6.0).view(2, 3)
out = sparse_decode.forward(values.to(device), indices.to(device), W.to(device)).cpu()
assert torch.equal(out, W[[1, 0]]), out
"""


def run(code, cwd, **environment):
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(cwd)!r})\n{code}"]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda f: f.name)
def test_imports_torch_triton_and_itself_only(file):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        assert {n.split(".")[0] for n in names} <= allowed, f"{file.name}:{node.lineno}"


def test_the_folder_works_copied_alone_under_another_name(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "vendored", ignore=shutil.ignore_patterns("__pycache__"))
    ended = run(USE, tmp_path)
    assert ended.returncode == 0, ended.stderr


def test_a_cpu_tensor_without_the_interpreter_is_an_error_that_says_how(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "vendored", ignore=shutil.ignore_patterns("__pycache__"))
    ended = run(USE.replace("torch.cuda.is_available()", "False"), tmp_path, TRITON_INTERPRET="0")
    assert ended.returncode == 1
    assert "RuntimeError: values: expected a CUDA or ROCm tensor, got one on cpu" in ended.stderr
    assert "TRITON_INTERPRET=1" in ended.stderr


def test_an_id_out_of_range_is_a_python_error_not_a_crash(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "vendored", ignore=shutil.ignore_patterns("__pycache__"))
    code = USE.replace("[[1], [0]]", "[[10**9], [0]]").replace("torch.cuda.is_available()", "False")
    ended = run(code, tmp_path, TRITON_INTERPRET="1")
    assert ended.returncode == 1 and "ValueError: indices: expected ids in 0..1, or -1" in ended.stderr
