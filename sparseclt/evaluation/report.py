"""Evaluations and sweeps as Markdown tables, aligned so that a terminal shows them well too."""

from collections.abc import Mapping, Sequence
from typing import Any

# key -> (column title, format); a missing key, None or NaN prints as "-".
_EVALUATION = {
    "name": ("module", ""),
    "fvu_vanilla": ("FVU vanilla", ".4f"),
    "fvu_sparse": ("FVU sparse", ".4f"),
    "excess_fvu": ("excess FVU", "+z.4f"),
    "connections_in_effect": ("connections in effect", ".1f"),
    "l0_vanilla": ("L0 vanilla", ".1f"),
    "l0_sparse": ("L0 sparse", ".1f"),
    "dead_vanilla": ("dead vanilla", ".1%"),
    "dead_sparse": ("dead sparse", ".1%"),
}
_SWEEP = {
    "C": ("C", "d"),
    "fvu_vanilla": ("FVU vanilla", ".4f"),
    "fvu_sparse": ("FVU sparse", ".4f"),
    "excess_fvu": ("excess FVU", "+z.4f"),
    "excess_over_baseline": ("excess over baseline", "+z.4f"),
    "fvu_pruned": ("FVU pruned only", ".4f"),
    "dead_sparse": ("dead sparse", ".1%"),
}
_CROSS_ENTROPY = {
    "model": "the model itself",
    "vanilla": "replaced, vanilla mode",
    "sparse": "replaced, sparsely-connected mode",
    "zero_ablated": "zero-ablated",
}


def evaluation_table(evaluation: Mapping[str, Any]) -> str:
    """An evaluation (see `evaluation.evaluate`) as Markdown: one row per module, their mean, and cross-entropies.

    FVU is a fraction, excess FVU sparse minus vanilla, "dead" a share of latents, cross-entropy in nats per
    token. "loss recovered" is the share of the way from zero ablation (0 %) to the model itself (100 %). What
    was not measured prints as "-".
    """
    rows = [*evaluation.get("modules", []), {**evaluation.get("mean", {}), "name": "mean"}]
    table = markdown_table(rows, _EVALUATION)
    entropies = evaluation.get("cross_entropy")
    return f"{table}\n\n{_cross_entropy_table(entropies)}" if entropies else table


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A sweep over C as a Markdown table, one row per C in rising order.

    rows: {"C": int, and any of "fvu_vanilla", "fvu_sparse", "excess_fvu" (sparse minus vanilla of the same
        run), "excess_over_baseline" (sparse minus vanilla of the run without connections), "fvu_pruned" (that
        run, pruned to C and not trained on), "dead_sparse"}, means over modules. What is missing prints "-".

    Raises ValueError if a row has no "C".
    """
    for row in rows:
        if not isinstance(row.get("C"), int):
            raise ValueError(f'rows must each have an int "C", got {dict(row)}')
    return markdown_table(sorted(rows, key=lambda row: row["C"]), _SWEEP)


def _cross_entropy_table(entropies: Mapping[str, float | None]) -> str:
    best, worst = entropies.get("model"), entropies.get("zero_ablated")
    rows = []
    for key, label in _CROSS_ENTROPY.items():
        value = entropies.get(key)
        recovered = None
        if value is not None and best is not None and worst is not None and worst != best:
            recovered = (worst - value) / (worst - best)
        rows.append({"run": label, "nats": value, "recovered": recovered})
    columns = {
        "run": ("next-token cross-entropy", ""),
        "nats": ("nats per token", ".4f"),
        "recovered": ("loss recovered", ".1%"),
    }
    return markdown_table(rows, columns)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, str]]) -> str:
    """A Markdown table, text to the left and numbers to the right, every column padded to one width.

    columns: by key of `rows`, the title and the format of the numbers ("": text). A missing key, None or NaN prints
        as "-".
    """
    titles = [title for title, _ in columns.values()]
    body = [[_cell(row.get(key), spec) for key, (_, spec) in columns.items()] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(titles, *body, strict=True)]
    left = [not spec for _, spec in columns.values()]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(cells, widths, left, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if is_left else "-" * (width - 1) + ":" for width, is_left in zip(widths, left, strict=True)]
    return "\n".join([line(titles), line(rule), *(line(cells) for cells in body)])


def _cell(value: Any, spec: str) -> str:
    return "-" if value is None or value != value else format(value, spec)
