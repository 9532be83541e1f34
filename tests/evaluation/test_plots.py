"""Plots: the right data under the right labels, and no global matplotlib state touched."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparseclt.evaluation import plots
from sparseclt.evaluation.plots import densities, fvu_against_c, loss_curves

METRICS = [
    {"step": 10 * i, "tokens": 1000 * i, "fvu_vanilla": 0.9 / i, "fvu_sparse": 1.5 / i}
    | {"fvu_vanilla/mlp_0": 0.8 / i, "fvu_vanilla/mlp_1": 1 / i, "dead_vanilla": 0.1, "dead_sparse": 0.2}
    for i in range(1, 6)
]
SWEEP: list[dict[str, Any]] = [
    {"C": 128, "fvu_sparse": 0.3, "fvu_vanilla": 0.2, "fvu_pruned": 0.9},
    {"C": 8, "fvu_sparse": 0.5, "fvu_vanilla": 0.25, "fvu_pruned": None},
    {"C": 32, "fvu_sparse": 0.4, "fvu_vanilla": 0.22, "fvu_pruned": 2.3, "fvu_random": 0.6, "fvu_all_open": 0.35},
]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures saved during the test."""
    saved: list[Figure] = []
    save = plots._save

    def record(figure: Figure, path: Path) -> None:
        save(figure, path)
        saved.append(figure)

    monkeypatch.setattr(plots, "_save", record)
    return saved


def lines(axes: Axes) -> dict[str, Any]:
    return {str(line.get_label()): line for line in axes.get_lines()}


def data(line: Any) -> list[tuple[float, float]]:
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_loss_curves_show_both_modes_single_modules_and_dead_latents(tmp_path: Path, figures: list[Figure]) -> None:
    loss_curves(METRICS, tmp_path / "new" / "loss.png")
    assert (tmp_path / "new" / "loss.png").read_bytes().startswith(b"\x89PNG")
    fvu, dead = figures[0].axes
    drawn = lines(fvu)
    for mode, label in {"vanilla": "vanilla mode", "sparse": "sparsely-connected mode"}.items():
        line = drawn[f"{label}, mean over modules"]
        assert data(line) == [(row["tokens"], row[f"fvu_{mode}"]) for row in METRICS]
    faint = [data(line) for line in fvu.get_lines() if line.get_alpha() is not None]
    assert [points for points in faint if points] == [
        [(row["tokens"], row[name]) for row in METRICS] for name in ("fvu_vanilla/mlp_0", "fvu_vanilla/mlp_1")
    ]
    assert fvu.get_yscale() == "log" and "tokens" in dead.get_xlabel()
    assert [[y for _, y in data(line)] for line in dead.get_lines()] == [[0.1] * 5, [0.2] * 5]


def test_rows_without_fvu_and_values_that_are_not_finite_are_left_out(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "fvu_vanilla": 0.5},
        {"step": 3, "fvu_vanilla": float("nan")},
    ]
    loss_curves([*rows, {"step": 4, "fvu_vanilla": 0.4, "fvu_sparse": None}], tmp_path / "loss.png")
    (fvu,) = figures[0].axes  # no dead share was logged: no panel for it
    assert data(lines(fvu)["vanilla mode, mean over modules"]) == [(2, 0.5), (4, 0.4)]
    assert fvu.get_xlabel() == "training step"
    assert legend(figures[0]) == ["vanilla mode, mean over modules"]


def test_fvu_is_drawn_over_sorted_c_with_the_cs_as_ticks(tmp_path: Path, figures: list[Figure]) -> None:
    fvu_against_c(SWEEP, tmp_path / "c.svg", baseline=0.15)
    (axes,) = figures[0].axes
    drawn = lines(axes)
    assert data(drawn["sparsely-connected mode"]) == [(8, 0.5), (32, 0.4), (128, 0.3)]
    assert data(drawn["vanilla mode"]) == [(8, 0.25), (32, 0.22), (128, 0.2)]
    (pruned,) = [line for label, line in drawn.items() if "pruned" in label]
    assert data(pruned) == [(32, 2.3), (128, 0.9)]
    (baseline,) = [line for label, line in drawn.items() if label.startswith("baseline:")]
    assert set(baseline.get_ydata()) == {0.15}
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "32", "128"]
    assert axes.get_xscale() == "log" and len(legend(figures[0])) == 6


def test_c_0_is_a_line_and_not_a_point(tmp_path: Path, figures: list[Figure]) -> None:
    fvu_against_c([*SWEEP, {"C": 0, "fvu_sparse": 0.7, "fvu_vanilla": 0.4}], tmp_path / "c.png")
    drawn = lines(figures[0].axes[0])
    (line,) = [line for label, line in drawn.items() if label.startswith("C = 0")]
    assert set(line.get_ydata()) == {0.7}
    assert data(drawn["sparsely-connected mode"]) == [(8, 0.5), (32, 0.4), (128, 0.3)]
    (random,) = [line for label, line in drawn.items() if "random" in label]
    assert data(random) == [(32, 0.6)]


def test_densities_show_each_module_and_mode_with_its_dead_share(tmp_path: Path, figures: list[Figure]) -> None:
    module = {"density": {"vanilla": [1, 4], "sparse": [2, 1]}, "dead_vanilla": 0.1, "dead_sparse": 0.25}
    modules = [{"name": f"mlp_{i}", **module} for i in range(5)]
    densities({"modules": modules, "density_edges": (-2, -1, 0), "tokens": 1234}, tmp_path / "density.png")
    shown = [panel for panel in figures[0].axes if panel.get_visible()]
    assert [panel.get_title() for panel in shown] == [f"mlp_{i}" for i in range(5)]
    counts = [patch.get_data().values.tolist() for patch in shown[4].patches]
    assert counts == [[1, 4], [2, 1]]
    assert "25.0% dead" in shown[0].get_legend().get_texts()[1].get_text()
    assert "1,234" in figures[0].get_supxlabel()


def test_only_what_was_given_is_in_the_legend(tmp_path: Path, figures: list[Figure]) -> None:
    fvu_against_c([{"C": 4, "fvu_sparse": 0.5}], tmp_path / "c.png", title="One run")
    assert legend(figures[0]) == ["sparsely-connected mode"]
    assert figures[0].axes[0].get_title() == "One run"


def test_every_axis_has_a_label_and_the_legend_covers_no_data(tmp_path: Path, figures: list[Figure]) -> None:
    loss_curves(METRICS, tmp_path / "loss.png")
    fvu_against_c(SWEEP, tmp_path / "c.png", baseline=0.15)
    for figure in figures:
        assert figure.axes[0].get_title() and figure.axes[-1].get_xlabel()
        box = figure.legends[0].get_window_extent()
        for axes in figure.axes:
            assert axes.get_ylabel()
            assert not box.overlaps(axes.get_window_extent())


def test_modes_differ_in_more_than_colour() -> None:
    for key in ("color", "linestyle", "marker"):
        assert len({style[key] for style in plots._STYLE.values()}) == len(plots._STYLE)


def test_nothing_to_plot_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='"fvu_vanilla" or "fvu_sparse"'):
        loss_curves([{"step": 1, "loss": 2.0}], tmp_path / "loss.png")
    with pytest.raises(ValueError, match="at least one"):
        fvu_against_c([{"C": 4, "fvu_sparse": None}], tmp_path / "c.png")
    with pytest.raises(ValueError, match='"C" of at least 0'):
        fvu_against_c([{"C": -1, "fvu_sparse": 0.5}], tmp_path / "c.png")
    with pytest.raises(ValueError, match="with a C above 0"):
        fvu_against_c([{"C": 0, "fvu_sparse": 0.5}], tmp_path / "c.png")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    code = f"""
import sys
from sparseclt.evaluation.plots import fvu_against_c
assert "matplotlib" not in sys.modules
fvu_against_c([{{"C": 4, "fvu_sparse": 0.5}}], {str(tmp_path / "c.png")!r})
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(plots.__file__).parents[1])
