"""Every kernel, compiled for real GPUs in a process of its own (in this one they may be interpreted)."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from csrc_triton.ahead_of_time import cases

ROOT = Path(__file__).parents[2]
GATHERS = ("gather_sum", "row_dots", "list_parts", "transposed_gather_sum")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The rows of benchmarks/compile_report.py, and how it ended."""
    file = tmp_path_factory.mktemp("compile") / "report.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "benchmarks" / "compile_report.py", "--json", file]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert file.exists(), ended.stderr
    return json.loads(file.read_text()), ended


def test_every_kernel_compiles_without_spills_and_within_shared_memory(report):
    rows, ended = report
    faults = [f"{row['kernel']} on {row['target']}: {row['fault']}" for row in rows if row["fault"]]
    assert not faults and ended.returncode == 0, ended.stderr
    assert all(row["registers"] > 0 and row["spills"] == 0 for row in rows)


def test_the_table_holds_every_kernel():
    trees = [ast.parse(file.read_text()) for file in (ROOT / "csrc_triton").glob("*.py")]
    functions = [node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    kernels = {name for name in functions if name.endswith("_kernel")}
    assert len(kernels) > 10 and {case.kernel.__name__ for case in cases()} == kernels


def test_every_op_is_there_on_every_target(report):
    rows, _ = report
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        names = {row["kernel"].split()[0] for row in rows if row["target"] == target}
        assert names >= {*GATHERS, "add_upstream", "d_values", "d_weights", "encoder_scores", "connection_scores"}


def test_gathers_load_16_bytes_at_once(report):
    rows, _ = report
    gathers = [row for row in rows if row["kernel"].split()[0] in GATHERS]
    assert [row for row in gathers if row["wide_loads"] < 1] == []


def test_the_encode_of_halves_runs_on_tensor_cores(report):
    rows, _ = report
    encodes = [row for row in rows if row["kernel"].startswith(("encoder_scores bf16", "encoder_scores fp16"))]
    assert len(encodes) >= 8 and [row for row in encodes if row["tensor_core"] < 1] == []
