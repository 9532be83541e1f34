"""What a sweep over C shows: how much of what connections could explain C of them do."""

from collections.abc import Mapping, Sequence
from typing import Any

ROW = (
    "fvu_vanilla", "fvu_sparse", "fvu_all_open", "excess_fvu", "propagated_error", "cost_of_sparsity",
    "dead_vanilla", "dead_sparse", "splitting", "splitting_near", "cofiring_twins",
)  # fmt: skip
"""The means of `metrics.Metrics` that a sweep has for each of its runs."""


def with_explained(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a sweep, each with its "explained_by_connections".

    That is (FVU at C = 0 - FVU at C) / (FVU at C = 0 - FVU all open): 0 for a run without connections, trained the same
    way, and 1 where C connections do as well as all of them. All three are of sparsely-connected mode, "fvu_sparse" and
    "fvu_all_open"; all open is measured in the run at C, which was not trained so, and may therefore be exceeded. None
    without a row for C = 0, and where opening all connections is no better than having none.
    """
    without = next((row["fvu_sparse"] for row in rows if row["C"] == 0), None)
    return [{**row, "explained_by_connections": _explained(without, row)} for row in rows]


def explained(without: float | None, sparse: float | None, all_open: float | None) -> float | None:
    """The share of the way from a FVU `without` connections to that with all of them open at which `sparse` is; None if
    one of them is not known, or if opening all is no better than having none."""
    if without is None or sparse is None or all_open is None or all_open >= without:
        return None
    return float((without - sparse) / (without - all_open))


def _explained(without: float | None, row: Mapping[str, Any]) -> float | None:
    sparse, all_open = row.get("fvu_sparse"), row.get("fvu_all_open")
    if row["C"] == 0 and sparse is not None and all_open is not None:
        return 0.0
    return explained(without, sparse, all_open)
