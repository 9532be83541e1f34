"""Figures of a training run and of a sweep over C, drawn without touching matplotlib's global state."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseclt.model.sites import MODE_NAMES
from sparseclt.storage.json_files import naming

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; the line styles tell them apart in grey.
_STYLE: dict[str, dict[str, Any]] = {
    "vanilla": {"color": "#0072B2", "linestyle": "-", "marker": "s"},
    "sparse": {"color": "#D55E00", "linestyle": "--", "marker": "o"},
    "pruned": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "random": {"color": "#CC79A7", "linestyle": (0, (3, 1, 1, 1, 1, 1)), "marker": "v"},
    "all_open": {"color": "#56B4E9", "linestyle": ":", "marker": "d"},
}
_AGAINST_C = {
    "pruned": "baseline pruned to C without further training, sparsely-connected mode",
    "random": "trained with C random connections, sparsely-connected mode",
    "sparse": "sparsely-connected mode",
    "all_open": "the same weights, all connections open",
    "vanilla": "vanilla mode",
}


def loss_curves(metrics: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Plot the FVU of both modes over training, and the share of dead latents where it was logged.

    metrics: one mapping a logged step, as from `loggers.read_metrics`. Means over modules are "fvu_vanilla"
        and "fvu_sparse", single modules "fvu_vanilla/mlp_0" ... (drawn faintly), dead shares (0 to 1)
        "dead_vanilla" and "dead_sparse". The x axis is "tokens" if every plotted row has it, else "step".
    path: where to save; its suffix chooses the format (.png, .pdf, .svg).

    Raises ValueError if no row has "fvu_vanilla" or "fvu_sparse".
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    rows = [row for row in metrics if any(name.startswith(("fvu_", "dead_")) for name in row)]
    if not any(_points(rows, "step", f"fvu_{mode}") for mode in MODE_NAMES):
        raise ValueError('metrics must have a row with "fvu_vanilla" or "fvu_sparse", got none')
    x = "tokens" if all("tokens" in row for row in rows) else "step"
    with_dead = any(_points(rows, x, f"dead_{mode}") for mode in MODE_NAMES)
    figure = Figure(figsize=(8, 7 if with_dead else 4.8), layout="constrained")
    panels = figure.subplots(1 + with_dead, sharex=True, squeeze=False, height_ratios=[2, 1][: 1 + with_dead])
    fvu, last = panels[0, 0], panels[-1, 0]

    modules = [name for row in rows for name in row if name.startswith(("fvu_vanilla/", "fvu_sparse/"))]
    modules = list(dict.fromkeys(modules))
    for mode, label in MODE_NAMES.items():
        line = _STYLE[mode] | ({"marker": None} if len(rows) > 1 else {})  # a lone point has no line to show
        own = [name for name in modules if name.startswith(f"fvu_{mode}/")]
        for i, name in enumerate(own):
            _draw(fvu, _points(rows, x, name), linewidth=0.9, alpha=0.2 + 0.4 * i / len(own), **line)
        _draw(fvu, _points(rows, x, f"fvu_{mode}"), linewidth=2, label=f"{label}, mean over modules", **line)
        if with_dead:
            _draw(last, _points(rows, x, f"dead_{mode}"), linewidth=2, **line)
    if modules:
        fvu.plot([], [], color="0.3", alpha=0.5, label="faint: single modules, darker is later")
    fvu.set_title("Reconstruction error during training")
    _log_fvu_axis(fvu)
    if with_dead:
        last.set(ylabel="dead latents\n(share of all)", ylim=(0, None))
        last.yaxis.set_major_formatter(PercentFormatter(xmax=1))
    last.set_xlabel("training tokens" if x == "tokens" else "training step")
    last.xaxis.set_major_formatter(EngFormatter(sep=" "))
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def fvu_against_c(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    baseline: float | None = None,
    title: str = "Reconstruction error against the number of connections",
) -> None:
    """Plot FVU against C, the number of connections kept per latent.

    rows: {"C": int, "fvu_sparse", "fvu_vanilla", "fvu_all_open", "fvu_pruned", "fvu_random"} in any order; a missing or
        None FVU is left out. "fvu_pruned" is the sparse FVU of the run without connections, pruned to C and not trained
        on, "fvu_random" that of a run with random connections. The "fvu_sparse" at C = 0 is a horizontal line.
    baseline: vanilla FVU of the run without connections, a horizontal line; excess FVU is the distance to it.
    path: where to save; its suffix chooses the format (.png, .pdf, .svg).

    Raises ValueError if there is nothing to plot or a C is negative.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    rows = sorted(rows, key=lambda row: row["C"])
    if rows and rows[0]["C"] < 0:
        raise ValueError(f'rows must have a "C" of at least 0, got {rows[0]["C"]}')
    without = next((row.get("fvu_sparse") for row in rows if row["C"] == 0), None)
    rows = [row for row in rows if row["C"]]  # the axis is logarithmic
    series = {name: _points(rows, "C", f"fvu_{name}") for name in _AGAINST_C}
    if not any(series.values()):
        names = ", ".join(f'"fvu_{name}"' for name in _AGAINST_C)
        raise ValueError(f"rows must hold at least one of {names} with a C above 0, got none")

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        _draw(axes, points, linewidth=2, markersize=7, label=_AGAINST_C[name], **_STYLE[name])
    if without is not None:
        label = "C = 0: trained in the same way without any connection, sparsely-connected mode"
        axes.axhline(without, color="0.4", linestyle=(0, (1, 1)), linewidth=1.6, label=label)
    if baseline is not None:
        label = "baseline: trained without connections, vanilla mode"
        axes.axhline(baseline, color="black", linestyle=(0, (6, 2)), linewidth=1.2, label=label)
    axes.set_title(title)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    ticks = sorted({row["C"] for row in rows})
    axes.set_xticks(ticks, [str(c) for c in ticks])
    axes.set_xlabel("C, connections kept per latent (log scale)")
    _log_fvu_axis(axes)
    figure.legend(loc="outside lower center", frameon=False)
    _save(figure, path)


def interaction(curves: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Plot the KL divergence of replaced models against the connections kept per latent.

    curves: by label of a run, the points of `InteractionSparsity.curve` as dictionaries ("kept", "kl").
    path: where to save; its suffix chooses the format (.png, .pdf, .svg).

    Raises ValueError if there is no curve.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    if not curves:
        raise ValueError("curves must hold at least one run, got none")
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    styles = list(_STYLE.values())
    for i, (label, points) in enumerate(curves.items()):
        shade = {"alpha": 1.0 if i < len(styles) else 0.5}  # more runs than colours: paler ones
        places = [(math.log2(1 + point["kept"]), point["kl"]) for point in points]
        _draw(axes, places, linewidth=2, markersize=6, label=label, **styles[i % len(styles)], **shade)
    ticks = sorted({point["kept"] for points in curves.values() for point in points})
    axes.set_xticks([math.log2(1 + kept) for kept in ticks], [str(kept) for kept in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("connections kept per latent, the most important ones (scale: log2(1 + kept))")
    axes.set_yscale("log")
    axes.set_ylabel("KL divergence from the language model\n(nats per token, log scale)")
    axes.set_title("Interaction sparsity: predictions against connections kept")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _save(figure, path)


def densities(evaluation: Mapping[str, Any], path: str | Path) -> None:
    """Plot how often latents fire: for each module and mode, how many latents have each firing rate.

    evaluation: as from `Evaluation.to_dict`.
    path: where to save; its suffix chooses the format (.png, .pdf, .svg).
    """
    from matplotlib.figure import Figure

    modules, edges = evaluation["modules"], evaluation["density_edges"]
    columns = min(4, len(modules))
    lines = math.ceil(len(modules) / columns)
    figure = Figure(figsize=(3 * columns, 2.2 * lines + 1), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for panel, module in zip(panels, modules, strict=False):
        for mode, counts in module["density"].items():
            dead = f"{module[f'dead_{mode}']:.1%} dead"
            style = {name: _STYLE[mode][name] for name in ("color", "linestyle")}
            panel.stairs(counts, edges, linewidth=1.6, label=f"{MODE_NAMES[mode]}: {dead}", **style)
        panel.set_title(module["name"], fontsize=9)
        panel.legend(frameon=False, fontsize=6, loc="upper left")
        panel.set_ylim(0, None)
    for panel in panels[len(modules) :]:
        panel.set_visible(False)
    figure.supxlabel(f"log10 of the share of {evaluation['tokens']:,} held-out tokens on which a latent fires")
    figure.supylabel("latents")
    _save(figure, path)


def _points(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """(x, y) of the rows that have a finite y."""
    return [(row[x], row[y]) for row in rows if row.get(y) is not None and math.isfinite(row[y])]


def _draw(axes: "Axes", points: Sequence[tuple[float, float]], **style: Any) -> None:
    """A line, or no line and no entry in the legend where there are no points."""
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def _log_fvu_axis(axes: "Axes") -> None:
    """Log y axis with plain numbers, and the line FVU = 1 where the data drawn so far comes near it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if axes.dataLim.y1 > 0.5:
        axes.axhline(1, color="0.45", linestyle=":", linewidth=1.2, zorder=1)
        axes.annotate(
            "FVU = 1: no better than predicting the mean",
            (1, 1),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="0.35",
            zorder=1,
        )
    axes.set_yscale("log")
    axes.set_ylabel("FVU, fraction of variance unexplained\n(lower is better, log scale)")
    ratio = axes.dataLim.y1 / axes.dataLim.minposy
    subs = (1, 2, 5) if ratio < 1000 else (1,)
    axes.yaxis.set_major_locator(MaxNLocator(6) if ratio < 4 else LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _save(figure: "Figure", path: str | Path) -> None:
    for axes in figure.axes:
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming(Path(path)):
        figure.savefig(path, dpi=150)
