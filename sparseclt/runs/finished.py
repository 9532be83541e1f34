"""Finished runs: evaluate, load or export what a run directory holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparseclt.evaluation.metrics import Evaluation
from sparseclt.export import FormatName
from sparseclt.export.stages import export
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.runs.measurement import held_out_rows, measure, measure_faithfulness, measure_interaction
from sparseclt.storage.run_config import imported_input, read_config
from sparseclt.training.run_directory import (
    Identity,
    check_identity,
    choose_checkpoint,
    finished_clt,
    language_model_of,
)


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
    return measure_faithfulness(replace(config, out=str(run)), clt, model, held_out_rows(config, model))


def interaction_of_run(run: str | Path, *, device: str | None = None) -> dict[str, Any]:
    """Measure how few connections the predictions of the finished run in directory `run` need; writes
    `interaction.json`, `interaction.md` and `interaction.png` there and returns the figures. On some of its held-out
    text."""
    config = read_config(run)
    clt, model = load_run(run, device=device)
    return measure_interaction(replace(config, out=str(run)), clt, model, held_out_rows(config, model))


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
