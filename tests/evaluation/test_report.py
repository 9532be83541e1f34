"""Tables: every number in its column, aligned as plain text, and "-" for what was not measured."""

import pytest

from sparseclt.evaluation.report import evaluation_table, sweep_table

EVALUATION = {
    "tokens": 4096,
    "C": 32,
    "modules": [
        {
            "name": "mlp_0",
            "fvu_vanilla": 0.1,
            "fvu_sparse": 0.1,
            "excess_fvu": -1e-9,
            "connections_in_effect": None,
        }
        | {"l0_vanilla": 16, "l0_sparse": 15.96, "dead_vanilla": 0.125, "dead_sparse": 0.0, "splitting": 0.1},
        {"name": "mlp_1", "fvu_vanilla": 0.2, "fvu_sparse": 0.31236, "excess_fvu": 0.11236}
        | {"connections_in_effect": 28.5, "l0_vanilla": 16.0, "dead_vanilla": 0.5, "dead_sparse": 1.0},
    ],
    "mean": {
        "fvu_vanilla": 0.15,
        "fvu_sparse": 0.20618,
        "excess_fvu": 0.11236,
        "connections_in_effect": 28.5,
    },
    "cross_entropy": {"model": 3.0, "vanilla": 3.5, "sparse": 5.0, "zero_ablated": 8.0},
}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_every_number_stands_in_its_column() -> None:
    modules, entropies = evaluation_table(EVALUATION).split("\n\n")
    header, _, *rows = cells(modules)
    assert header == (
        "module | FVU vanilla | FVU sparse | excess FVU | connections in effect | L0 vanilla | L0 sparse | "
        "dead vanilla | dead sparse"
    ).split(" | ")
    assert rows == [
        ["mlp_0", "0.1000", "0.1000", "+0.0000", "-", "16.0", "16.0", "12.5%", "0.0%"],
        ["mlp_1", "0.2000", "0.3124", "+0.1124", "28.5", "16.0", "-", "50.0%", "100.0%"],
        ["mean", "0.1500", "0.2062", "+0.1124", "28.5", "-", "-", "-", "-"],
    ]
    assert cells(entropies)[2:] == [
        ["the model itself", "3.0000", "100.0%"],
        ["replaced, vanilla mode", "3.5000", "90.0%"],
        ["replaced, sparsely-connected mode", "5.0000", "60.0%"],
        ["zero-ablated", "8.0000", "0.0%"],
    ]


def test_tables_are_aligned_in_a_terminal_and_valid_markdown() -> None:
    for table in [
        *evaluation_table(EVALUATION).split("\n\n"),
        sweep_table([{"C": 8}, {"C": 128, "fvu_sparse": 0.3}]),
    ]:
        lines = table.splitlines()
        bars = [[i for i, character in enumerate(line) if character == "|"] for line in lines]
        assert all(positions == bars[0] for positions in bars)
        assert all(set(cell) <= set("-:") and len(cell) > 0 for cell in cells(table)[1])
        assert cells(table)[1][-1].endswith("-:")


def test_what_was_not_measured_is_a_dash_and_unmeasured_entropies_are_left_out() -> None:
    table = evaluation_table({"modules": [{"name": "mlp_0", "fvu_sparse": float("nan")}], "mean": {}})
    assert cells(table)[2:] == [["mlp_0"] + ["-"] * 8, ["mean"] + ["-"] * 8]
    partial = evaluation_table({**EVALUATION, "cross_entropy": {"vanilla": 3.5}}).split("\n\n")[1]
    assert cells(partial)[2:4] == [["the model itself", "-", "-"], ["replaced, vanilla mode", "3.5000", "-"]]


def test_loss_recovered_does_not_divide_by_zero() -> None:
    same = {"model": 3.0, "vanilla": 3.0, "sparse": 3.0, "zero_ablated": 3.0}
    assert all(row[2] == "-" for row in cells(evaluation_table({"cross_entropy": same}).split("\n\n")[1])[2:])


def test_a_sweep_is_sorted_by_c() -> None:
    table = sweep_table(
        [
            {"C": 100, "fvu_vanilla": 0.2, "fvu_sparse": 0.3, "excess_fvu": 0.1, "excess_over_baseline": 0.15}
            | {"fvu_pruned": 2.3, "dead_sparse": 0.25},
            {"C": 8, "fvu_sparse": 0.5, "fvu_pruned": None},
        ]
    )
    header, _, *rows = cells(table)
    assert header[0] == "C" and len(header) == 7
    assert rows == [
        ["8", "-", "0.5000", "-", "-", "-", "-"],
        ["100", "0.2000", "0.3000", "+0.1000", "+0.1500", "2.3000", "25.0%"],
    ]
    with pytest.raises(ValueError, match='must each have an int "C"'):
        sweep_table([{"fvu_sparse": 0.5}])
