"""The plots of the benchmark report."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = Mapping[str, Any]

_STYLE: dict[str, dict[str, Any]] = {  # Okabe and Ito's colours; distinct markers and lines for print in grey
    "ours": {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    "dense": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
}
_LETTERS = {"N": "tokens N", "F": "latents F", "K": "active latents K", "C": "connections C", "L": "layers L"}


def ratios(compared: Sequence[tuple[Sequence[Row], Row]], path: Path) -> None:
    """Every contender's time over that of our best backend, one line per comparison, with quartiles.

    compared: the rows of each comparison, and that of our best backend.
    """
    figure = Figure(figsize=(10, 1.6 + 0.34 * len(compared)), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(row["contender"] for group, _ in compared for row in group))
    palette = ["#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#0072B2", "#999999", "#000000"]
    markers = "sDv^<>oPX"  # nine, and eight colours: no pair repeats before the 72nd contender
    for n, name in enumerate(names):
        points = [
            (ours["ratios"][name], y)
            for y, (_, ours) in enumerate(compared)
            if name in ours["ratios"] and ours["contender"] != name
        ]
        if points:
            x = [ratio["median"] for ratio, _ in points]
            low = [ratio["median"] - ratio["low"] for ratio, _ in points]
            high = [ratio["high"] - ratio["median"] for ratio, _ in points]
            style: dict[str, Any] = {"color": palette[n % len(palette)], "marker": markers[n % len(markers)]}
            axes.errorbar(x, [y for _, y in points], xerr=[low, high], linestyle="", capsize=2, label=name, **style)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("time over that of our best backend (log scale; right of 1: ours is faster)")
    labels = [f"{group[0]['case']} {group[0]['direction']}\n{_shapes(group[0]['shapes'])}" for group, _ in compared]
    axes.set_yticks(range(len(compared)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(color="0.9", axis="x")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _shapes(shapes: Mapping[str, int]) -> str:
    return " ".join(f"{letter}{size}" for letter, size in shapes.items())


def crossing(points: Sequence[tuple[float, float]], budget: float) -> float | None:
    """The x at which a rising curve reaches the budget, interpolated on logarithmic axes; None if it does not."""
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y0 <= budget < y1:
            share = (math.log(budget) - math.log(y0)) / (math.log(y1) - math.log(y0))
            return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0)))
    return None


def scaling(curves: Sequence[Row], run: Row, path: Path) -> None:
    """Time (above) and memory (below) of one training step, one column per size. Dotted: memory of dense by formula, up
    to the cross where it exceeds the budget."""
    letters = list(dict.fromkeys(row["curve"] for row in curves))
    figure = Figure(figsize=(3.2 * len(letters) + 0.6, 6.4), layout="constrained")
    panels = figure.subplots(2, len(letters), squeeze=False, sharey="row", sharex="col")
    for column, letter in enumerate(letters):
        time, memory = panels[0, column], panels[1, column]
        _measured([row for row in curves if row["curve"] == letter], time, memory, labelled=column == 0)
        _by_formula(letter, run, time, memory, labelled=column == 0)
        for axes in (time, memory):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(color="0.9")
            axes.set_axisbelow(True)
        memory.set_xlabel(_LETTERS.get(letter, letter))
    panels[0, 0].set_ylabel("seconds per step")
    panels[1, 0].set_ylabel("MiB: states and transient")
    figure.legend(loc="outside lower center", ncols=4 if len(letters) > 1 else 1, frameon=False)
    figure.savefig(path, dpi=130)


def _measured(curve: Sequence[Row], time: Axes, memory: Axes, labelled: bool) -> None:
    for contender, style in _STYLE.items():
        rows = [row for row in curve if row["contender"].startswith(contender)]
        rows = sorted(rows, key=lambda row: row["value"])
        if not rows:
            continue
        x, spread = [row["value"] for row in rows], [row["seconds"] for row in rows]
        label = rows[0]["contender"] if labelled else None
        time.plot(x, [s["median"] for s in spread], label=label, **style)
        time.fill_between(x, [s["low"] for s in spread], [s["high"] for s in spread], alpha=0.2, color=style["color"])
        memory.plot(x, [(row["peak_bytes"] + row["states_bytes"]) / 2**20 for row in rows], **style)


def _by_formula(letter: str, run: Row, time: Axes, memory: Axes, labelled: bool) -> None:
    """The memory of dense by formula, the budget, and a cross where they meet."""
    points, budget = run["dense_memory"].get(letter, []), run["memory_budget"]
    limit = crossing(points, budget)
    if limit is None:  # it does not grow with this letter
        points = [(x, y) for x, y in points if x <= time.get_xlim()[1]]
    memory.plot(
        [x for x, _ in points], [y / 2**20 for _, y in points], color=_STYLE["dense"]["color"], linestyle=":",
        label="dense, by formula" if labelled else None,
    )  # fmt: skip
    memory.axhline(
        budget / 2**20, color="0.4", linewidth=1, label=f"budget, {budget / 2**30:.3g} GiB" if labelled else None
    )
    if limit is None:
        return
    memory.plot([limit], [budget / 2**20], "X", color="black", markersize=9)
    where = f"{letter} = {float(f'{limit:.2g}'):,.0f}"
    memory.annotate(
        f"dense out of memory\nat {where}", (limit, budget / 2**20), xytext=(-8, 4),
        textcoords="offset points", ha="right", va="bottom", fontsize=7,
    )  # fmt: skip
    time.axvline(limit, color="0.4", linewidth=1, linestyle=":")
