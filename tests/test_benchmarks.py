"""The benchmark suite runs: once, with tiny shapes, as a test that it works. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from plots import crossing
from report import duration, size, write_report

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The JSON file of one run of the tiny set."""
    file = tmp_path_factory.mktemp("benchmarks") / "result.json"
    command = [sys.executable, "-m", "pytest", "benchmarks/", "--tiny", "-q", "--benchmark-json", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in [n for n in environment if n == "TRITON_INTERPRET" or n.startswith("PYTEST_")]:
        del environment[name]  # a run of its own, not one beside this one, where pytest-benchmark would not measure
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return file


def rows_of(result: Path) -> list[dict]:
    return [benchmark["extra_info"] for benchmark in json.loads(result.read_text())["benchmarks"]]


def test_every_op_and_mode_is_measured_against_dense(result):
    measured = {(row["case"], row["direction"], row["contender"]) for row in rows_of(result)}
    for op in ("batchtopk_encode", "jumprelu_encode"):
        for direction in ("forward", "backward"):
            assert {(op, direction, "ours: torch"), (op, direction, "dense")} <= measured
    ops = ("sparse_decode", "topk_encode", "virtual_weights", "virtual_matmul", "connected_encode")
    for op in (*ops, "virtual_weights+virtual_matmul"):
        for direction in ("forward", "backward"):
            for contender in ("ours: torch", "dense", "torch"):
                assert (op, direction, contender) in measured
    assert ("select_connections", "forward", "ours: torch") in measured
    assert ("training step, vanilla mode", "step", "floor: encode GEMMs") in measured
    assert ("training step, both modes", "step", "unmasked: dense") in measured


def test_a_row_says_all_there_is_to_know(result):
    for row in rows_of(result):
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["peak_bytes"] >= 0 and row["flops"] > 0 and row["bytes"] > 0 and row["achieved"] > 0
        assert row["ceiling"]["flops"] > 0 and row["ceiling"]["bytes"] > 0
        assert row["shapes"] and row["dtype"] == "float32" and row["threads"] == 1 and row["versions"]["torch"]
        assert row["device"] and row["ratios"]


def test_contenders_agree_closely_where_top_k_has_no_near_ties(result):
    for row in rows_of(result):
        assert all(error < 1e-3 for error in row["gate"]["errors"].values()), row


def test_dense_takes_more_memory_than_ours_where_it_holds_matrices(result):
    peaks = {
        (row["case"], row["contender"]): row["peak_bytes"] for row in rows_of(result) if row["direction"] == "step"
    }
    for case in ("training step, vanilla mode", "training step, both modes"):
        assert peaks[case, "ours: torch"] < peaks[case, "dense"]


def test_the_report_has_its_sections_and_plots(result, tmp_path):
    page = write_report(result, tmp_path / "docs" / "benchmarks.md")
    text = page.read_text()
    for part in ("- device:", "- threads: 1", "- command: `pytest benchmarks/ --tiny", "## Thresholds on", "GFLOP"):
        assert part in text
    assert "13 of 13 are not in the tiny set" in text
    for plot in ("benchmarks-scaling.png", "benchmarks-ratios.png"):
        assert (page.parent / plot).stat().st_size > 10_000 and f"({plot})" in text


def test_the_report_prints_what_a_threshold_measured(result, tmp_path):
    """With thresholds that this run did measure, one out of reach."""
    run = json.loads(result.read_text())
    rows = [b["extra_info"] for b in run["benchmarks"] if b["extra_info"]["case"] == "sparse_decode"]
    ours = next(r for r in rows if r["contender"] == "ours: torch" and r["direction"] == "forward")
    asked = {
        "work": "decode", "case": "sparse_decode", "direction": "forward", "shapes": ours["shapes"],
        "against": "dense", "memory": None, "at_most": None, "backends": ["torch"],
    }  # fmt: skip
    run["sparseclt"]["thresholds"] = [asked | {"times": 1e-9}, asked | {"times": 1e9}]
    file = tmp_path / "run.json"
    file.write_text(json.dumps(run))
    lines = [line for line in write_report(file, tmp_path / "b.md").read_text().splitlines() if "| decode" in line]
    assert f"{ours['ratios']['dense']['median']:.3g} (" in lines[0]
    assert lines[0].endswith("yes    |") and lines[1].endswith("**no** |")


def test_a_failed_gate_is_told_and_not_timed(tmp_path):
    import torch
    from compare import Comparison, Contender
    from measure import Effort

    from sparseclt.costs import Cost

    def broken():
        raise RuntimeError("no such kernel")

    contenders = {
        "right": Contender(lambda: lambda: torch.ones(3), Cost(1, 1)),
        "wrong": Contender(lambda: lambda: torch.tensor([1.0, 1.0, 1.1]), Cost(1, 1)),
        "not a number": Contender(lambda: lambda: torch.tensor([1.0, 1.0, torch.nan]), Cost(1, 1)),
        "broken": Contender(lambda: broken, Cost(1, 1)),
    }
    truth = {"reference": lambda: {"result": torch.ones(3)}}
    comparison = Comparison("case", "forward", {}, "cpu", contenders, truth, lambda t: {"result": t}, {"": 1e-4})
    rows = comparison.run(Effort(0.0, 2, 2, 0.0), small=True)
    assert "failed" not in rows["right"] and len(rows["right"]["samples"]) == 2
    assert "relative error of result is 0.058" in rows["wrong"]["failed"]
    assert "inf" in rows["not a number"]["failed"]
    assert rows["broken"]["failed"] == "RuntimeError: no such kernel"
    assert all("seconds" not in row and "ratios" not in row for name, row in rows.items() if name != "right")
    assert rows["right"]["ratios"] == {}


def test_transient_memory_is_the_peak_less_results_and_gradients():
    import torch
    from measure import weigh

    def function():
        scratch = torch.ones(1_000_000)
        return scratch[:1000] * 2

    assert 4_000_000 <= weigh(function).allocated < 4_100_000
    parameter = torch.ones(1_000_000, requires_grad=True)
    data = torch.ones(1_000_000)

    def step():
        parameter.grad = None
        (parameter * data).sum().backward()

    # Of product, its gradient and the parameter's, the last is a result.
    assert 4_000_000 <= weigh(step, [parameter]).allocated <= 8_100_000


def test_bad_input_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(ValueError, match="pytest benchmarks/"):
            write_report(tmp_path / name, tmp_path / "b.md")


def test_numbers_for_people():
    assert [size(n) for n in (512, 1536, 3 << 20, 5 << 40)] == ["512 B", "1.5 KiB", "3 MiB", "5.12e+03 GiB"]
    assert [duration(t) for t in (2.5, 0.012, 3e-5)] == ["2.5 s", "12 ms", "30 us"]
    assert crossing([(1, 10), (2, 1000)], 100) == pytest.approx(2**0.5)
    assert crossing([(1, 10), (2, 10)], 100) is None
