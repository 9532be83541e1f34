"""Sweeps over C: a vanilla baseline, a run for each C, and their controls."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparseclt.config import TrainConfig
from sparseclt.connections.policies import check_connections
from sparseclt.evaluation import plots, report
from sparseclt.evaluation.frontier import ROW, with_explained
from sparseclt.runs.measurement import measure, pruned
from sparseclt.runs.series import Series
from sparseclt.storage.json_files import replace_file, replace_json
from sparseclt.training.untrained import build_clt


def sweep(config: TrainConfig, Cs: Sequence[int], *, random: bool = True) -> list[dict[str, Any]]:
    """Train one vanilla baseline, one sparsely-connected run for each C (0: without any connection) and, with `random`,
    one with as many random connections, below `config.out`.

    Returns, and writes as `sweep.json`, `sweep.md` and `fvu_against_c.png`, one row per C: FVU of both modes, excess
    over the baseline's vanilla FVU and within the run, split into propagated error and cost of sparsity, the share that
    the connections explain (`evaluation.frontier`), and the sparse FVU of the baseline pruned to C without further
    training and of the run with random connections.

    Goes on where it was stopped: finished runs are kept, one under way is resumed. Raises ValueError, before anything
    is trained, for a C that no module has room for, a run that does not fit, and a run of other options in its place.
    """
    baseline, runs, controls = _planned(config, Cs, random)
    out, planned = Path(config.out), (baseline, *runs.values(), *controls.values())
    series = Series(planned)
    series.check_fits(planned)
    model, rows = series.language_model(config), series.held_out(config)
    untrained = build_clt(baseline, model)
    for C in Cs:
        check_connections(untrained, C)
    del untrained
    clt = series.fit(baseline)
    base = measure(baseline, clt, model, rows).mean.fvu_vanilla
    after_pruning = {row["C"]: row["fvu_sparse"] for row in pruned(config, clt, model, rows, Cs)}
    del clt
    table: list[dict[str, Any]] = []
    for C, run in runs.items():
        row = _sweep_row(run, series)
        excess = None if row["fvu_sparse"] is None else row["fvu_sparse"] - base
        row |= {"C": C, "excess_over_baseline": excess, "fvu_pruned": after_pruning[C]}
        if C in controls:
            row["fvu_random"] = _sweep_row(controls[C], series)["fvu_sparse"]
        table = with_explained([*table, row])
        replace_json(out / "sweep.json", {"baseline_fvu": base, "rows": table})
    replace_file(out / "sweep.md", report.sweep_table(table) + "\n")
    plots.fvu_against_c(table, out / "fvu_against_c.png", baseline=base)
    return table


Runs = dict[int, TrainConfig]  # by C


def _planned(config: TrainConfig, Cs: Sequence[int], random: bool) -> tuple[TrainConfig, Runs, Runs]:
    """The baseline of a sweep, its run for each C, smallest first, and that with random connections."""
    c, out = config.connections, Path(config.out)
    if c.policy not in ("top", "learned"):
        raise ValueError(f"connections.policy: expected 'top' or 'learned' in a sweep over C, got {c.policy!r}")
    if not Cs or len(set(Cs)) < len(Cs):
        raise ValueError(f"connections: expected numbers of connections, each once, got {list(Cs)}")
    # Without connections there is nothing to fall to or to learn.
    none = replace(c, per_latent=0, policy="top", start_per_latent=None)
    chosen = {C: replace(c, per_latent=C) if C else none for C in sorted(Cs)}
    runs = {C: replace(config, out=str(out / f"C_{C}"), connections=chosen[C]) for C in chosen}
    controls = {
        C: replace(config, out=str(out / f"random_C_{C}"), connections=replace(c, policy="random", per_latent=C))
        for C in chosen if C and random
    }  # fmt: skip
    return replace(config, out=str(out / "baseline"), connections=replace(c, policy="none")), runs, controls


def _sweep_row(config: TrainConfig, series: Series) -> dict[str, Any]:
    """What a sweep shows of one run."""
    clt = series.fit(config)
    mean = measure(config, clt, series.language_model(config), series.held_out(config)).mean
    return {name: getattr(mean, name) for name in ROW}
