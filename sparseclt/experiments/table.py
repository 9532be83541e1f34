"""The table of an experiment: a row per variant, with the spread over seeds in every cell."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sparseclt.config import TrainConfig
from sparseclt.evaluation.report import markdown_table
from sparseclt.experiments.columns import COLUMNS, Record, References
from sparseclt.experiments.experiment import Experiment, Variant
from sparseclt.storage.run_config import changed_fields

WIDEST = 6  # columns of a table
NOT_SHOWN = ("out", "seed", "device", "logging.", "checkpoints.", "compute.")

Records = Mapping[tuple[str, int], Record]
"""Finished runs, by the variant's label and the seed."""


def rows_of(experiment: Experiment, records: Records) -> list[dict[str, Any]]:
    """One row per variant with a finished run: its "variant" label, "options", "seeds", and under "columns" for each
    column the "values" by seed with their "mean", "least" and "most"; None where nothing was measured."""
    rows = []
    for variant in experiment.variants:
        seeds = sorted(seed for label, seed in records if label == variant.label)
        if seeds:
            columns = {name: _spread(_values(name, variant, seeds, records)) for name in experiment.columns}
            rows.append({"variant": variant.label, "options": variant.options, "seeds": seeds, "columns": columns})
    return rows


def _values(column: str, variant: Variant, seeds: Sequence[int], records: Records) -> list[float | None]:
    def reference(label: str | None, seed: int) -> Record | None:
        return None if label is None else records.get((label, seed))

    return [
        COLUMNS[column].value(
            records[variant.label, seed],
            References(reference(variant.vanilla, seed), reference(variant.unconnected, seed)),
        )
        for seed in seeds
    ]


def _spread(values: Sequence[float | None]) -> dict[str, Any] | None:
    """None unless every run has a value: a mean over fewer would be of another thing than its neighbours."""
    measured = [value for value in values if value is not None]
    if len(measured) < len(values):
        return None
    return {
        "values": measured, "mean": sum(measured) / len(measured), "least": min(measured), "most": max(measured),
    }  # fmt: skip


def mean_curves(experiment: Experiment, records: Records) -> dict[str, list[dict[str, float]]]:
    """By label, the curve of `InteractionSparsity` ("kept", "kl"), a mean over the seeds."""
    curves: dict[str, list[dict[str, float]]] = {}
    for variant in experiment.variants:
        runs = [run["interaction"]["curve"] for (label, _), run in records.items() if label == variant.label]
        if runs:
            curves[variant.label] = [
                {"kept": points[0]["kept"], "kl": sum(point["kl"] for point in points) / len(points)}
                for points in zip(*runs, strict=True)
            ]
    return curves


def page(experiment: Experiment, base: TrainConfig, rows: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, in parts that are not too wide, with the question, the command, and what a cell is."""
    return "\n\n".join(
        [
            experiment.question,
            f"    {command(experiment, base)}",
            *(markdown_table([_shown(row) for row in rows], titles) for titles in _parts(experiment)),
            "Each cell: mean (least to most) over the seeds.",
        ]
    )


def command(experiment: Experiment, base: TrainConfig) -> str:
    """The command that trains these runs."""
    changed = changed_fields(experiment.config(), base)
    options = [
        f"--{name.replace('_', '-')} {_as_option(value)}"
        for name, (_, value) in changed.items()
        if not name.startswith(NOT_SHOWN)
    ]
    return " ".join(["sparseclt experiment", experiment.name, *options])


def _as_option(value: object) -> str:
    return " ".join(map(_as_option, value)) if isinstance(value, list | tuple) else shlex.quote(str(value))


def _parts(experiment: Experiment) -> Iterator[dict[str, tuple[str, str]]]:
    """The columns of each of its tables, which would be too wide as one: `WIDEST` besides the variant."""
    titles = {"options": ("options", ""), "seeds": ("seeds", "d")}
    titles |= {name: (COLUMNS[name].title, "s") for name in experiment.columns}
    for first in range(0, len(titles), WIDEST):
        yield {"variant": ("variant", ""), **dict([*titles.items()][first : first + WIDEST])}


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = {"variant": row["variant"], "options": f"`{row['options']}`" if row["options"] else "none"}
    cells = {name: _cell(spread, COLUMNS[name].format) for name, spread in row["columns"].items()}
    return {**shown, "seeds": len(row["seeds"]), **cells}


def _cell(spread: Mapping[str, Any] | None, spec: str) -> str | None:
    if spread is None:
        return None
    mean, least, most = (format(spread[name], spec) for name in ("mean", "least", "most"))
    return mean if len(spread["values"]) == 1 else f"{mean} ({least} to {most})"
