"""Experiments carried out: every variant trained with every seed, measured, and put into one table."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

from sparseclt.config import TrainConfig, to_dict
from sparseclt.config.strict import ConfigError
from sparseclt.evaluation import plots
from sparseclt.evaluation.metrics import Metrics
from sparseclt.experiments.columns import COLUMNS, Measurement, Record
from sparseclt.experiments.experiment import Experiment
from sparseclt.experiments.table import mean_curves, page, rows_of
from sparseclt.runs.measurement import measure, measure_faithfulness, measure_interaction
from sparseclt.runs.series import Series, begun_run, is_finished, seconds_of
from sparseclt.storage.json_files import read_json, replace_file, replace_json
from sparseclt.storage.run_config import CONFIG, changed_fields, read_config

RECORD = "experiment.json"
NO_MATTER = ("out", "logging.", "checkpoints.")  # how runs may differ that are the same

Plan = dict[tuple[str, int], TrainConfig]


def conduct(
    experiment: Experiment, base: TrainConfig | None = None, *, seeds: int = 3, only: Sequence[str] = ()
) -> str:
    """Train the variants of `experiment`, or `only` those with these labels, with seeds 0 to `seeds` - 1, each as a run
    directory `base.out`/LABEL/seed_S, and measure them.

    base: what all runs have in common; None: `experiment.config()`.

    Returns the table, and writes it as NAME.md and NAME.json into `base.out` after each run: one row per variant with a
    finished run. Goes on where it was stopped: finished runs are kept, one under way is resumed. A text without a
    held-out part of its own is divided by the seed, so that the spread over seeds includes that of the held-out text.
    A finished run of an experiment beside this one is taken in place of a new one if it was trained in the same way.

    Raises ValueError, before anything is trained, for labels that do not exist, a run that does not fit, and a run of
    other options in the place of one of these.
    """
    base = experiment.config() if base is None else base
    plan = planned(experiment, base, seeds)
    _check_labels(experiment, only)
    series = Series([*plan.values()])
    records = {key: record for key, config in plan.items() if (record := _recorded(experiment, config)) is not None}
    due = {key: config for key, config in plan.items() if key not in records and (not only or key[0] in only)}
    if due:
        series.check_fits([*due.values()])
    for key, config in due.items():
        records[key] = _carry_out(experiment, series, config)
        _write(experiment, base, records)
    return _write(experiment, base, records)


def planned(experiment: Experiment, base: TrainConfig, seeds: int) -> Plan:
    """The configuration of every run, by the variant's label and the seed."""
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    if base.seed:
        raise ValueError(f"seed: expected none in an experiment, which trains with seeds 0 to {seeds - 1}")
    variants = {variant.label: variant.of(base) for variant in experiment.variants}
    return {
        (label, seed): _shared(replace(config, seed=seed, out=str(Path(base.out) / label / f"seed_{seed}")))
        for seed in range(seeds)
        for label, config in variants.items()
    }


def _shared(config: TrainConfig) -> TrainConfig:
    """`config` in the directory of a finished run that is the same, of an experiment beside its own; or unchanged."""
    out = Path(config.out)
    if begun_run(config):
        return config
    for path in sorted(out.parents[2].glob(f"*/*/{out.name}/{CONFIG}")):
        try:
            stored = read_config(path.parent)
        except ConfigError:  # of another version
            continue
        other = replace(config, out=str(path.parent))
        if all(name.startswith(NO_MATTER) for name in changed_fields(stored, other)) and is_finished(other):
            return other
    return config


def _check_labels(experiment: Experiment, only: Sequence[str]) -> None:
    labels = [variant.label for variant in experiment.variants]
    for label in only:
        if label not in labels:
            raise ValueError(f"only: expected labels of experiment {experiment.name}, {', '.join(labels)}; got {label}")


def _recorded(experiment: Experiment, config: TrainConfig) -> Record | None:
    """What was measured of a finished run before; None if it lacks something that this experiment shows."""
    path = Path(config.out) / RECORD
    if not path.is_file() or not is_finished(config):
        return None
    stored = read_config(config.out)
    if (stored.model.path, stored.data.source) != (config.model.path, config.data.source):
        return None  # the run says whether they have only moved, once it is loaded
    record = read_json(path)
    evaluation = record.get("evaluation", {})
    whole = {field.name for field in fields(Metrics)} <= evaluation.get("mean", {}).keys()
    return record if whole and all(_has(record, name) for name in _needs(experiment)) else None


def _has(record: Record, measurement: Measurement) -> bool:
    of = record.get("evaluation", {}) if measurement == "cross_entropy" else record
    return of.get(measurement) is not None


def _needs(experiment: Experiment) -> set[Measurement]:
    """What the columns need besides an evaluation."""
    return {need for name in experiment.columns if (need := COLUMNS[name].needs) is not None}


def _carry_out(experiment: Experiment, series: Series, config: TrainConfig) -> Record:
    clt, path = series.fit(config), Path(config.out) / RECORD
    before = read_json(path) if path.is_file() else {}
    needs = _needs(experiment) | {name for name in get_args(Measurement) if _has(before, name)}
    model, rows = series.language_model(config), series.held_out(config)
    evaluation = measure(config, clt, model, rows, cross_entropy="cross_entropy" in needs)
    record = {
        "evaluation": evaluation.to_dict(),
        "seconds": seconds_of(config.out),
        "interaction": measure_interaction(config, clt, model, rows) if "interaction" in needs else None,
        "faithfulness": measure_faithfulness(config, clt, model, rows) if "faithfulness" in needs else None,
    }
    replace_json(path, record)
    return record


def _write(experiment: Experiment, base: TrainConfig, records: dict[tuple[str, int], Any]) -> str:
    """The table of the runs that are finished, which is also written into the experiment's directory."""
    rows, out = rows_of(experiment, records), Path(base.out)
    out.mkdir(parents=True, exist_ok=True)  # not there yet if all runs so far are another experiment's
    table = page(experiment, base, rows)
    content = {"experiment": experiment.name, "question": experiment.question, "base": to_dict(base), "rows": rows}
    replace_json(out / f"{experiment.name}.json", content)
    replace_file(out / f"{experiment.name}.md", table + "\n")
    if "interaction" in _needs(experiment) and records:
        plots.interaction(mean_curves(experiment, records), out / f"{experiment.name}.png")
    return table
