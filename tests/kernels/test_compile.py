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


def row_of(report, name, target="sm_90"):
    (row,) = (row for row in report[0] if row["kernel"] == name and row["target"] == target)
    return row


def test_two_blocks_of_the_product_of_halves_share_a_multiprocessor(report):
    for element in ("bf16", "fp16"):
        row = row_of(report, f"encoder_scores {element} has_bias")
        assert row["tensor_core"] >= 4 and row["registers"] <= 128 and 2 * row["shared"] <= 227 * 1024


def test_fp32_runs_on_tensor_cores_unless_ieee_is_asked_for(report):
    rows = [row for row in report[0] if row["kernel"].startswith(("encoder_scores tf32", "connection_scores tf32"))]
    assert len(rows) >= 15 and all(row["tensor_core"] > 0 for row in rows)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert row_of(report, "encoder_scores ieee has_bias")["tensor_core"] == 0


def test_pairs_of_upstream_latents_cost_few_instructions(report):
    """Of all warps of a block, for a block of 32 pairs with all that is done to them."""
    add = row_of(report, "add_upstream bf16")
    assert add["warps"] == 1 and add["loop"] <= 600


def test_connections_find_their_slots_in_few_instructions(report):
    """64 connections of a selected latent among all slots of a token, with everything that is done to those found."""
    for dtype in ("bf16", "fp32"):
        row = row_of(report, f"connected d_upstream {dtype} C 64")
        assert row["warps"] == 2 and row["loop"] <= 200, row


def test_a_row_is_selected_by_one_warp_which_waits_for_no_other(report):
    for length in (128, 512, 1024, 2048):
        for stage in ("groups", "scores"):
            row = row_of(report, f"select {stage} {length}")
            assert row["warps"] == 1 and row["loop"] <= 600, row
        assert row["loop_barriers"] == 0, row
