"""Tables: every number in its column, aligned as plain text, and "-" for what was not measured."""

import pytest

from sparseclt.evaluation.frontier import with_explained
from sparseclt.evaluation.report import evaluation_table, markdown_table, sweep_table

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
        "propagated_error": 0.08236,
        "cost_of_sparsity": 0.03,
        "splitting": 0.1,
        "dead_in_training_sparse": 0.02,
        "dead_in_training_vanilla": 0.01,
    },
    "cross_entropy": {"model": 3.0, "vanilla": 3.5, "sparse": 5.0, "zero_ablated": 8.0},
}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_every_number_stands_in_its_column() -> None:
    modules, entropies, excess, latents, meaning = evaluation_table(EVALUATION).split("\n\n")
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
    assert cells(excess)[-1] == ["mean", "+0.1124", "+0.0824", "+0.0300", "-", "-"]
    assert cells(latents)[
        0
    ] == "module | dead in training, vanilla | dead in training, sparse | decoder cosine > 0.9".split(" | ")
    assert cells(latents)[-1] == ["mean", "1.0%", "2.0%", "10.0%"]
    assert meaning == (
        "Dead: fired on none of 4,096 held-out tokens; dead in training: on none of the last 1,000,000 training tokens."
    )


def test_tables_are_aligned_in_a_terminal_and_valid_markdown() -> None:
    for table in [
        *evaluation_table(EVALUATION).split("\n\n")[:-1],
        *sweep_table([{"C": 8}, {"C": 128, "fvu_sparse": 0.3}]).split("\n\n"),
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
            | {"propagated_error": 0.08, "cost_of_sparsity": 0.02, "explained_by_connections": 0.75}
            | {"fvu_pruned": 2.3, "fvu_random": 0.6, "dead_sparse": 0.25, "splitting": 0.5},
            {"C": 8, "fvu_sparse": 0.5, "fvu_pruned": None},
        ]
    )
    figures, latents = table.split("\n\n")
    header, _, *rows = cells(figures)
    assert header[0] == "C" and len(header) == 10
    assert rows == [
        ["8", "-", "0.5000", *["-"] * 7],
        ["100", "0.2000", "0.3000", "+0.1000", "+0.1500", "+0.0800", "+0.0200", "75.0%", "2.3000", "0.6000"],
    ]
    assert cells(latents)[2:] == [["8", *["-"] * 5], ["100", "-", "25.0%", "50.0%", "-", "-"]]
    with pytest.raises(ValueError, match='must each have an int "C"'):
        sweep_table([{"fvu_sparse": 0.5}])


def test_connections_explain_what_lies_between_none_and_all() -> None:
    rows = [
        {"C": 0, "fvu_sparse": 0.4, "fvu_all_open": 0.9},
        {"C": 8, "fvu_sparse": 0.2, "fvu_all_open": 0.1},
        {"C": 64, "fvu_sparse": 0.05, "fvu_all_open": 0.1},
    ]
    explained = [row["explained_by_connections"] for row in with_explained(rows)]
    assert explained == [0, pytest.approx(2 / 3), pytest.approx(7 / 6)]
    assert [row["explained_by_connections"] for row in with_explained(rows[1:])] == [None, None], "no run at C = 0"


def test_a_narrow_column_has_a_rule_that_markdown_knows():
    assert markdown_table([{"C": 0}, {"C": 8}], {"C": ("C", "d")}).splitlines()[:2] == ["|  C |", "| -: |"]
