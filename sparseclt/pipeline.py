"""Whole runs: train and evaluate, evaluate what a run directory holds, sweep over C."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt import plots, report
from sparseclt.activity import Activity
from sparseclt.config import TrainConfig
from sparseclt.connections import check_connections, select_top_connections
from sparseclt.evaluation import evaluate
from sparseclt.language_model import LanguageModel
from sparseclt.loggers import read_metrics
from sparseclt.model import SparseCLT
from sparseclt.trainer import Trainer, load_rows, read_config

PRUNING_TOKENS = 16_384  # held-out tokens for each point of the curve of FVU against C


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, evaluate on held-out text, write tables and plots; returns the evaluation."""
    trainer = Trainer(config)
    trainer.fit()
    return evaluate_run(config.out, trainer.language_model)


def evaluate_run(run: str | Path, language_model: LanguageModel | None = None) -> dict[str, Any]:
    """Evaluate the finished run in directory `run` on its held-out text; writes `evaluation.json`, `table.md` and the
    plots there and returns the evaluation."""
    run, config = Path(run), read_config(run)
    if language_model is None:
        language_model = LanguageModel.load(config.model.path, layers=config.model.layers)
    clt = SparseCLT.from_pretrained(run / "clt")
    rows = held_out_rows(config, language_model)
    result = evaluate(clt, language_model, rows, backend=config.backend)
    if clt.connected and any(module.upstream for module in clt):
        few = rows[: max(1, PRUNING_TOKENS // rows.shape[1])]
        result["fvu_against_C"] = fvu_against_c(clt, language_model, few, _ladder(clt), config)
        title = "The trained CLT with its connections chosen anew for each C, not trained on"
        plots.fvu_against_c(result["fvu_against_C"], run / "fvu_against_c.png", title=title)
    (run / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    (run / "table.md").write_text(report.evaluation_table(result) + "\n")
    plots.loss_curves(read_metrics(run / "metrics.jsonl"), run / "loss.png")
    return result


def held_out_rows(config: TrainConfig, language_model: LanguageModel) -> Tensor:
    """Rows [R, S] for evaluation."""
    rows = load_rows(config, language_model.tokenizer, "held_out")
    return rows[: max(1, config.data.held_out_tokens // rows.shape[1])]


def _ladder(clt: SparseCLT) -> list[int]:
    """C = 1, 2, 4, ... up to twice the connections that the CLT was trained with."""
    trained = max(module.connections.C for module in clt if module.connections)
    most = max(module.upstream for module in clt)
    return sorted({C for C in (2**i for i in range(20)) if C <= min(2 * trained, most)} | {trained})


def fvu_against_c(
    clt: SparseCLT, language_model: LanguageModel, rows: Tensor, Cs: Sequence[int], config: TrainConfig
) -> list[dict[str, Any]]:
    """Choose each C's most important connections of the trained weights, without training on, and measure.

    One row a C: {"C", "fvu_vanilla", "fvu_sparse", "excess_fvu"}, means over modules. The CLT's own connections
    are put back.
    """
    activity = Activity(len(clt.sites), clt.architecture.latents, device=rows.device)
    with torch.no_grad():
        for batch in rows.split(16):
            captured = language_model.capture(batch, attention=clt.architecture.attention == "latents")
            activity.update(clt(captured, "vanilla", backend=config.backend).latents)
    magnitude = activity.magnitude(config.connections.importance)
    own = [(module.connections, module.logits) for module in clt]
    points = []
    try:
        for C in Cs:
            chosen = select_top_connections(clt, magnitude, C, config.backend)
            for module, connections in zip(clt, chosen, strict=True):
                module.logits = None
                if connections is not None:
                    module.connect(connections)
            mean = evaluate(clt, language_model, rows, cross_entropy=False, backend=config.backend)["mean"]
            points.append({"C": C, **{k: mean[k] for k in ("fvu_vanilla", "fvu_sparse", "excess_fvu")}})
    finally:
        for module, (connections, logits) in zip(clt, own, strict=True):
            module.connections, module.logits = connections, logits
    return points


def sweep(config: TrainConfig, Cs: Sequence[int]) -> list[dict[str, Any]]:
    """Train one vanilla baseline and one sparsely-connected run for each C below `config.out`.

    Returns, and writes as `sweep.json`, `sweep.md` and `fvu_against_c.png`, one row a C: FVU of both modes, excess
    over the baseline's vanilla FVU and within the run, and the sparse FVU of the baseline pruned to C without
    further training.
    """
    out = Path(config.out)
    baseline = Trainer(
        replace(config, out=str(out / "baseline"), connections=replace(config.connections, policy="none"))
    )
    model = baseline.language_model
    for C in Cs:
        check_connections(baseline.clt, C)
    baseline.fit()
    rows = held_out_rows(config, model)
    base = evaluate_run(out / "baseline", model)["mean"]["fvu_vanilla"]
    few = rows[: max(1, PRUNING_TOKENS // rows.shape[1])]
    pruned = {row["C"]: row["fvu_sparse"] for row in fvu_against_c(baseline.clt, model, few, Cs, config)}
    table = []
    for C in Cs:
        run = replace(config, out=str(out / f"C_{C}"), connections=replace(config.connections, per_latent=C))
        Trainer(run, language_model=model, rows=baseline.stream.rows).fit()
        result = evaluate_run(run.out, model)
        mean = result["mean"]
        table.append(
            {
                "C": C,
                "fvu_vanilla": mean["fvu_vanilla"],
                "fvu_sparse": mean["fvu_sparse"],
                "excess_fvu": mean["excess_fvu"],
                "excess_over_baseline": mean["fvu_sparse"] - base,
                "fvu_pruned": pruned[C],
                "dead_sparse": mean["dead_sparse"],
            }
        )
        (out / "sweep.json").write_text(json.dumps({"baseline_fvu": base, "rows": table}, indent=2) + "\n")
    (out / "sweep.md").write_text(report.sweep_table(table) + "\n")
    plots.fvu_against_c(table, out / "fvu_against_c.png", baseline=base)
    return table
