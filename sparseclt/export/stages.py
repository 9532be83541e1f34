"""From a trained CLT to the one that is exported, and what each stage on the way costs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.evaluation.metrics import captures, evaluate
from sparseclt.evaluation.report import markdown_table
from sparseclt.export import FormatName
from sparseclt.export.calibration import with_thresholds
from sparseclt.export.fine_tuning import fine_tune
from sparseclt.export.formats import FORMATS
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT, in_evaluation_mode
from sparseclt.model.nonlinearity import full_rows
from sparseclt.model.sites import Mode

TITLES: dict[Mode, str] = {"vanilla": "Vanilla mode", "sparse": "Sparsely-connected mode"}


def export(
    clt: SparseCLT,
    language_model: LanguageModel,
    config: TrainConfig,
    rows: Tensor,
    name: str,
    path: Path,
    format: FormatName,
    finetune_steps: int,
) -> str:
    """Write `clt`, trained as `config` says, to directory `path` in a format; returns a table of what that costs.

    `rows` [R, S]: held-out text. A TopK CLT gets its thresholds, where the format needs some, on half of them; all
    figures are of the other half. `name`: that of the run.
    Raises ValueError for fewer than two rows, and for fine-tuning where a format keeps TopK.
    """
    if len(rows) < 2:
        raise ValueError(
            "data.held_out_tokens: expected at least 2 rows, to calibrate on one half and measure the other"
        )
    to = FORMATS[format]
    if finetune_steps and not to.thresholds:
        raise ValueError(f"finetune_steps: expected 0 with format {format!r}, which keeps TopK, got {finetune_steps}")
    stages = {"as trained": clt}
    if to.thresholds and clt.architecture.activation != "jumprelu":
        stages["calibrated"] = clt = with_thresholds(clt, language_model, rows[::2])
    if finetune_steps:
        stages["fine-tuned"] = clt = fine_tune(clt, language_model, config, finetune_steps)
    to.write(clt, language_model, rows[1::2], name, path)
    if not to.thresholds:
        return f"{format}: vanilla mode, as trained"
    measured = {
        stage: evaluate(own, language_model, rows[1::2], cross_entropy=False).to_dict() for stage, own in stages.items()
    }
    tables = [f"{TITLES[mode]}\n\n{stage_table(measured, mode)}" for mode in TITLES if _measured(measured, mode)]
    return "\n\n".join([*tables, _limit(clt, language_model, rows[1::2])])


def _measured(evaluations: Mapping[str, Mapping[str, Any]], mode: Mode) -> bool:
    return all(evaluation["mean"][f"fvu_{mode}"] is not None for evaluation in evaluations.values())


def stage_table(evaluations: Mapping[str, Mapping[str, Any]], mode: Mode) -> str:
    """FVU and L0 of one mode, per module and in the mean, at each stage, as Markdown."""
    columns = {"name": ("module", "")}
    columns |= {f"fvu {stage}": (f"FVU {stage}", ".4f") for stage in evaluations}
    columns |= {f"l0 {stage}": (f"L0 {stage}", ".1f") for stage in evaluations}
    parts = [[*e["modules"], {**e["mean"], "name": "mean"}] for e in evaluations.values()]
    rows = []
    for of_module in zip(*parts, strict=True):
        row = {"name": of_module[0]["name"]}
        for stage, metrics in zip(evaluations, of_module, strict=True):
            row |= {f"fvu {stage}": metrics[f"fvu_{mode}"], f"l0 {stage}": metrics[f"l0_{mode}"]}
        rows.append(row)
    return markdown_table(rows, columns)


@in_evaluation_mode
@torch.no_grad()
def _limit(clt: SparseCLT, language_model: LanguageModel, rows: Tensor) -> str:
    """How often our limit on active latents, which other tools do not have, may have changed something."""
    full = seen = 0
    for _, activations in captures(clt, language_model, rows, 16):
        latents = clt(activations, "vanilla").latents
        full += sum(int(full_rows(z)) for z in latents)
        seen += len(latents) * activations.counted_tokens
    slots = clt.architecture.slots
    return f"Tokens that may want more than the {slots} latents that a module has room for here: {full / seen:.2%}"
