"""Whole runs: train and evaluate, evaluate what a run directory holds, sweep over C."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.connections.policies import check_connections
from sparseclt.data.text import load_rows
from sparseclt.evaluation import plots, report
from sparseclt.evaluation.metrics import Evaluation, evaluate
from sparseclt.evaluation.pruning import fvu_against_c
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.training.loggers import read_metrics
from sparseclt.training.run_directory import CLT, METRICS, read_config
from sparseclt.training.trainer import Trainer

PRUNING_TOKENS = 32_768  # held-out tokens for the curve of FVU against C


def train(config: TrainConfig) -> Evaluation:
    """Train, evaluate on held-out text, write tables and plots; returns the evaluation."""
    trainer = Trainer(config)
    clt, model = trainer.fit(), trainer.language_model
    return _measure(config, clt, model, held_out_rows(config, model))


def evaluate_run(run: str | Path, language_model: LanguageModel | None = None) -> Evaluation:
    """Evaluate the finished run in directory `run` on its held-out text; writes `evaluation.json`, `table.md` and the
    plots there and returns the evaluation."""
    config = replace(read_config(Path(run)), out=str(run))
    if language_model is None:
        language_model = LanguageModel.load(config.model.path, layers=config.model.layers, dtype=config.model.dtype)
    clt = SparseCLT.from_pretrained(Path(run) / CLT)
    return _measure(config, clt, language_model, held_out_rows(config, language_model))


def _measure(config: TrainConfig, clt: SparseCLT, language_model: LanguageModel, rows: Tensor) -> Evaluation:
    run = Path(config.out)
    result = evaluate(clt, language_model, rows, backend=config.compute.backend)
    if clt.connected and clt.reads_upstream and len(rows) > 1:
        points = _pruned(config, clt, language_model, rows, _ladder(clt))
        result = replace(result, fvu_against_C=points)
        title = "The trained CLT with its connections chosen anew for each C, not trained on"
        plots.fvu_against_c(points, run / "fvu_against_c.png", title=title)
    (run / "evaluation.json").write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    (run / "table.md").write_text(report.evaluation_table(result.to_dict()) + "\n")
    plots.loss_curves(read_metrics(run / METRICS), run / "loss.png")
    return result


def _pruned(config: TrainConfig, clt: SparseCLT, language_model: LanguageModel, rows: Tensor, Cs: Sequence[int]):
    few = rows[: max(2, PRUNING_TOKENS // rows.shape[1])]
    importance = config.connections.importance
    return fvu_against_c(clt, language_model, few, Cs, importance=importance, backend=config.compute.backend)


def held_out_rows(config: TrainConfig, language_model: LanguageModel) -> Tensor:
    """Rows [R, S] for evaluation."""
    rows = load_rows(config, language_model.tokenizer, "held_out")
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
    """
    out = Path(config.out)
    runs = {
        C: replace(config, out=str(out / f"C_{C}"), connections=replace(config.connections, per_latent=C)) for C in Cs
    }
    baseline = Trainer(
        replace(config, out=str(out / "baseline"), connections=replace(config.connections, policy="none"))
    )
    model = baseline.language_model
    for C in Cs:
        check_connections(baseline.clt, C)
    baseline.fit()
    rows = held_out_rows(config, model)
    base = _measure(baseline.config, baseline.clt, model, rows).mean.fvu_vanilla
    pruned = {row["C"]: row["fvu_sparse"] for row in _pruned(config, baseline.clt, model, rows, Cs)}
    table = []
    for C, run in runs.items():
        clt = Trainer(run, language_model=model, rows=baseline.batches.rows).fit()
        mean = _measure(run, clt, model, rows).mean
        assert mean.fvu_sparse is not None
        table.append(
            {
                "C": C,
                "fvu_vanilla": mean.fvu_vanilla,
                "fvu_sparse": mean.fvu_sparse,
                "excess_fvu": mean.excess_fvu,
                "excess_over_baseline": mean.fvu_sparse - base,
                "fvu_pruned": pruned[C],
                "dead_sparse": mean.dead_sparse,
            }
        )
        (out / "sweep.json").write_text(json.dumps({"baseline_fvu": base, "rows": table}, indent=2) + "\n")
    (out / "sweep.md").write_text(report.sweep_table(table) + "\n")
    plots.fvu_against_c(table, out / "fvu_against_c.png", baseline=base)
    return table
