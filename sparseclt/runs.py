"""Whole runs: train and evaluate, go on with a run, evaluate, load or export what a run directory holds."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sparseclt.config import TrainConfig
from sparseclt.evaluation import report
from sparseclt.evaluation.faithfulness import faithfulness
from sparseclt.evaluation.metrics import Evaluation
from sparseclt.export import FormatName
from sparseclt.export.stages import export
from sparseclt.graph.prompt_scores import prompt_scores
from sparseclt.imports import import_clt
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.measurement import PRUNING_TOKENS, held_out_rows, measure, rows_at_a_time
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.json_files import replace_file
from sparseclt.storage.run_config import (
    CLT,
    check_changes,
    check_trained,
    check_unused,
    imported_input,
    note_import,
    read_config,
    write_config,
)
from sparseclt.training.run_directory import (
    Identity,
    check_identity,
    choose_checkpoint,
    finished,
    finished_clt,
    language_model_of,
    run_directory,
    write_identity,
)
from sparseclt.training.several_ranks import in_turn
from sparseclt.training.trainer import Trainer


def train(config: TrainConfig) -> Evaluation | None:
    """Train, evaluate on held-out text, write tables and plots; returns the evaluation, or None on all but the first of
    several ranks."""
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


def finish(trainer: Trainer) -> Evaluation | None:
    """Train to the last step, evaluate on held-out text, write tables and plots; None on all but the first of several
    ranks."""
    model = trainer.language_model
    with in_turn(trainer.ranks):
        rows = held_out_rows(trainer.config, model)  # before the training: text that is missing is found at once
    clt = finished(trainer.fit(), trainer.out)
    return None if clt is None else measure(trainer.config, clt, model, rows)


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
    return measure(config, clt, model, held_out_rows(config, model))


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
    return measure(config, clt, language_model, held_out_rows(config, language_model), path if checkpoint else None)


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


def faithfulness_of_run(run: str | Path, *, device: str | None = None) -> dict[str, Any]:
    """Measure whether the connections of the finished run in directory `run` matter; writes `faithfulness.json` and
    `faithfulness.md` there and returns the figures. On some of its held-out text, and its first rows as prompts."""
    config = read_config(run)
    clt, model = load_run(run, device=device)
    rows = held_out_rows(config, model)
    few = rows[: max(1, PRUNING_TOKENS // rows.shape[1])]
    at_a_time = max(1, rows_at_a_time(config, model) // 4)  # three models' logits are alive
    figures = faithfulness(clt, model, few, batch_rows=at_a_time, backend=config.compute.backend).to_dict()
    figures["graphs"] = asdict(prompt_scores(clt, model, rows))
    replace_file(Path(run) / "faithfulness.json", json.dumps(figures, indent=2) + "\n")
    replace_file(Path(run) / "faithfulness.md", report.faithfulness_table(figures) + "\n")
    return figures


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    format: FormatName = "circuit-tracer",
    finetune_steps: int = 0,
    device: str | None = None,
) -> str:
    """Write the CLT of the finished run in directory `run` to directory `out` as another tool reads it, after
    `finetune_steps` of further training with thresholds. Returns a table of what that costs (`export.stages`)."""
    clt, model = load_run(run, device=device)
    config = replace(read_config(run), device=str(model.device))
    rows = held_out_rows(config, model)
    return export(clt, model, config, rows, Path(run).resolve().name, Path(out), format, finetune_steps)
