"""Whole runs: train and evaluate, go on with a run, evaluate what a run directory holds, sweep over C."""

import gc
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.connections.policies import check_connections
from sparseclt.data.text import load_rows
from sparseclt.data.tokens import check_token_ids
from sparseclt.evaluation import plots, report
from sparseclt.evaluation.metrics import Evaluation, evaluate
from sparseclt.evaluation.pruning import fvu_against_c
from sparseclt.export.calibration import calibrate
from sparseclt.export.circuit_tracer import export_circuit_tracer
from sparseclt.imports import import_clt
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.json_files import replace_file
from sparseclt.storage.run_config import (
    CLT,
    CONFIG,
    check_changes,
    check_trained,
    check_unused,
    imported_input,
    note_import,
    read_config,
    write_config,
)
from sparseclt.training import memory
from sparseclt.training.loggers import read_metrics
from sparseclt.training.run_directory import (
    METRICS,
    Identity,
    check_identity,
    choose_checkpoint,
    finished_clt,
    language_model_of,
    run_directory,
    write_identity,
)
from sparseclt.training.trainer import Trainer

PRUNING_TOKENS = 32_768  # held-out tokens for the curve of FVU against C


def train(config: TrainConfig) -> Evaluation:
    """Train, evaluate on held-out text, write tables and plots; returns the evaluation."""
    check_unused(config.out)
    return finish(Trainer(config))


def resume(run: str | Path, config: TrainConfig | None = None, *, checkpoint: str | Path | None = None) -> Trainer:
    """The run in directory `run` at its newest whole checkpoint, or at `checkpoint`: `finish` goes on with it.

    `config`: its configuration, perhaps with more steps, another device, or other intervals for logs and checkpoints.
    Raises ValueError, naming the option, for a change that would train something else.
    """
    stored = read_config(run)
    check_trained(run)
    config = replace(config or stored, out=str(run))
    check_changes(stored, config, run)  # before anything is loaded
    trainer = Trainer(config)
    trainer.load(Path(run), checkpoint)
    return trainer


def finish(trainer: Trainer) -> Evaluation:
    """Train to the last step, evaluate on held-out text, write tables and plots."""
    model = trainer.language_model
    rows = held_out_rows(trainer.config, model)  # before the training: text that is missing is found at once
    clt = trainer.fit()
    return _measure(trainer.config, clt, model, rows)


def import_run(path: str | Path, config: TrainConfig, input_hook: str | None = None) -> Evaluation:
    """Make a finished run of the CLT in directory `path`, which another tool wrote, in directory `config.out`, on the
    model and text of `config`, and evaluate it. Connections are chosen for it, nothing is trained."""
    check_unused(config.out)
    config, clt, model, rows = import_clt(path, config, input_hook)
    run = Path(config.out)
    with run_directory(run, begun=lambda: (run / CLT).is_dir()):
        write_identity(run, Identity.of(model, rows))
        write_config(run, config)
        note_import(run, path, model.shape.mlp_input)
        clt.save_pretrained(run / CLT)
    return _measure(config, clt, model, held_out_rows(config, model))


def evaluate_run(
    run: str | Path,
    language_model: LanguageModel | None = None,
    *,
    device: str | None = None,
    checkpoint: str | Path | None = None,
) -> Evaluation:
    """Evaluate the run in directory `run`, or one of its checkpoints, on its held-out text; writes `evaluation.json`,
    `table.md` and the plots there and returns the evaluation.

    Computed on `device`, or where the run was trained. Raises ValueError for another language model or tokenizer than
    it was trained on.
    """
    config = replace(read_config(run), out=str(run))
    if device is not None:
        config = replace(config, device=device)
    path = finished_clt(Path(run), config.steps) if checkpoint is None else choose_checkpoint(Path(run), checkpoint)
    if language_model is None:
        language_model = language_model_of(Path(run), config)
    else:
        check_identity(Path(run), Identity.of(language_model, rows=None))
    clt = SparseCLT.from_pretrained(path, device=language_model.device)
    return _measure(config, clt, language_model, held_out_rows(config, language_model))


def load_run(run: str | Path, *, device: str | None = None) -> tuple[SparseCLT, LanguageModel]:
    """The CLT of the finished run in directory `run`, and its language model, both in fp32, to be looked at.

    On `device`, or where the run was trained. Raises ValueError for another language model or tokenizer than it was
    trained on.
    """
    config = read_config(run)
    config = replace(config, device=device or config.device)
    path = finished_clt(Path(run), config.steps)
    model = language_model_of(Path(run), config)
    if config.model.dtype != "fp32":  # whose weights have another digest, so that they cannot be checked
        wide = LanguageModel.of(replace(config, model=replace(config.model, dtype="fp32")))
        model = wide.reading(model.shape.mlp_input)
    clt = SparseCLT.from_pretrained(path, device=model.device, dtype=torch.float32)
    clt.warns_when_full = imported_input(run) is not None
    return clt, model


def export_run(run: str | Path, out: str | Path, *, device: str | None = None) -> str:
    """Write the CLT of the finished run in directory `run` to directory `out`, for circuit-tracer; a TopK one is
    calibrated on half of the run's held-out text. Returns a table of FVU and L0 in vanilla mode on the other half."""
    clt, model = load_run(run, device=device)
    rows = held_out_rows(read_config(run), model)
    if len(rows) < 2:
        raise ValueError(
            "data.held_out_tokens: expected at least 2 rows, to calibrate on one half and measure the other"
        )
    calibrated = calibrate(clt, model, rows[::2]) if clt.architecture.activation == "topk" else clt
    before, after = (evaluate(c, model, rows[1::2], cross_entropy=False).to_dict() for c in (clt, calibrated))
    export_circuit_tracer(calibrated, model, Path(out))
    return report.export_table(before, after)


def _measure(config: TrainConfig, clt: SparseCLT, language_model: LanguageModel, rows: Tensor) -> Evaluation:
    """Evaluate `clt` on `rows` [R, S], and write tables and plots into the run directory."""
    run = Path(config.out)
    result = evaluate(
        clt, language_model, rows, batch_rows=_rows_at_a_time(config, language_model), backend=config.compute.backend
    )
    if clt.connected and clt.reads_upstream and len(rows) > 1:
        points = _pruned(config, clt, language_model, rows, _ladder(clt))
        result = replace(result, fvu_against_C=points)
        title = "The trained CLT with its connections chosen anew for each C, not trained on"
        plots.fvu_against_c(points, run / "fvu_against_c.png", title=title)
    replace_file(run / "evaluation.json", json.dumps(result.to_dict(), indent=2) + "\n")
    replace_file(run / "table.md", report.evaluation_table(result.to_dict()) + "\n")
    if (run / METRICS).is_file():  # an imported CLT has none
        plots.loss_curves(read_metrics(run / METRICS), run / "loss.png")
    return result


def _pruned(config: TrainConfig, clt: SparseCLT, language_model: LanguageModel, rows: Tensor, Cs: Sequence[int]):
    """FVU of `clt` with the best C connections for each of `Cs`, on some of `rows` [R, S]."""
    few = rows[: max(2, PRUNING_TOKENS // rows.shape[1])]
    importance = config.connections.importance
    return fvu_against_c(
        clt, language_model, few, Cs, importance=importance, batch_rows=_rows_at_a_time(config, language_model),
        backend=config.compute.backend,
    )  # fmt: skip


def _rows_at_a_time(config: TrainConfig, language_model: LanguageModel) -> int:
    """How many rows an evaluation takes at a time, so that it fits into the memory that is left."""
    return memory.evaluation_rows(config, language_model.shape, memory.available_bytes(language_model.device))


def held_out_rows(config: TrainConfig, language_model: LanguageModel) -> Tensor:
    """Rows [R, S] for evaluation."""
    rows = load_rows(config, language_model.tokenizer, "held_out")
    check_token_ids(rows, language_model.shape.vocab, language_model.tokenizer)
    return rows[: max(1, config.data.held_out_tokens // rows.shape[1])]


def _ladder(clt: SparseCLT) -> list[int]:
    """C = 1, 2, 4, ... up to twice the connections that the CLT was trained with."""
    trained = max(module.connections.C for module in clt if module.connections)
    most = max(module.upstream for module in clt)
    return sorted({C for C in (2**i for i in range(20)) if C <= min(2 * trained, most)} | {trained})


def sweep(config: TrainConfig, Cs: Sequence[int]) -> list[dict[str, Any]]:
    """Train one vanilla baseline and one sparsely-connected run for each C below `config.out`.

    Returns, and writes as `sweep.json`, `sweep.md` and `fvu_against_c.png`, one row a C: FVU of both modes, excess
    over the baseline's vanilla FVU and within the run, and the sparse FVU of the baseline pruned to C without
    further training.

    Goes on where it was stopped: finished runs are kept, one under way is resumed. Raises ValueError, before anything
    is trained, for a C that no module has room for, a run that does not fit, and a run of other options in its place.
    """
    baseline, runs = _planned(config, Cs)
    out = Path(config.out)
    for run in (baseline, *runs.values()):
        _check_begun(run)
    model = LanguageModel.of(config)
    rows = held_out_rows(config, model)
    shape, available = replace(model.shape, parameters=0), memory.available_bytes(model.device)
    for run in (baseline, *runs.values()):
        memory.check_fits(run, shape, available)
    trainer = Trainer(baseline, language_model=model)
    for C in Cs:
        check_connections(trainer.clt, C)
    train_rows = trainer.batches.rows
    clt = _fit_or_resume(trainer)
    base = _measure(baseline, clt, model, rows).mean.fvu_vanilla
    pruned = {row["C"]: row["fvu_sparse"] for row in _pruned(config, clt, model, rows, Cs)}
    del trainer, clt
    table = []
    for C, run in runs.items():
        _release_memory(model.device)
        row = _sweep_row(run, model, train_rows, rows)
        excess = None if row["fvu_sparse"] is None else row["fvu_sparse"] - base
        table.append({"C": C, **row, "excess_over_baseline": excess, "fvu_pruned": pruned[C]})
        replace_file(out / "sweep.json", json.dumps({"baseline_fvu": base, "rows": table}, indent=2) + "\n")
    replace_file(out / "sweep.md", report.sweep_table(table) + "\n")
    plots.fvu_against_c(table, out / "fvu_against_c.png", baseline=base)
    return table


def _planned(config: TrainConfig, Cs: Sequence[int]) -> tuple[TrainConfig, dict[int, TrainConfig]]:
    """The baseline of a sweep, and its run for each C."""
    c, out = config.connections, Path(config.out)
    if c.policy not in ("top", "learned"):
        raise ValueError(f"connections.policy: expected 'top' or 'learned' in a sweep over C, got {c.policy!r}")
    if not Cs or len(set(Cs)) < len(Cs):
        raise ValueError(f"connections: expected numbers of connections, each once, got {list(Cs)}")
    runs = {C: replace(config, out=str(out / f"C_{C}"), connections=replace(c, per_latent=C)) for C in Cs}
    return replace(config, out=str(out / "baseline"), connections=replace(c, policy="none")), runs


def _check_begun(config: TrainConfig) -> None:
    """A ValueError if `config.out` holds a run with other options, or something else that is no directory."""
    if not (Path(config.out) / CONFIG).exists():
        check_unused(config.out)
        return
    stored = read_config(config.out)
    check_changes(stored, config, config.out)
    if stored.steps != config.steps:
        raise ValueError(f"steps: expected the {stored.steps} that {config.out} was begun with, got {config.steps}")


def _fit_or_resume(trainer: Trainer) -> SparseCLT:
    begun = (trainer.out / CONFIG).exists()
    return trainer.fit(resume=trainer.out if begun else None)


def _sweep_row(config: TrainConfig, model: LanguageModel, train_rows: Tensor, rows: Tensor) -> dict[str, Any]:
    """What a sweep shows of one run."""
    clt = _fit_or_resume(Trainer(config, language_model=model, rows=train_rows))
    mean = _measure(config, clt, model, rows).mean
    return {name: getattr(mean, name) for name in ("fvu_vanilla", "fvu_sparse", "excess_fvu", "dead_sparse")}


def _release_memory(device: torch.device) -> None:
    """Give back what the last run held, which the check of the next one would count as taken."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
