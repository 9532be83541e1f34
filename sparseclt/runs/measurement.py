"""The evaluation of a run, on its held-out text, with the tables and plots that are left in its directory."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.data.text import load_rows
from sparseclt.data.tokens import check_token_ids
from sparseclt.evaluation import plots, report
from sparseclt.evaluation.dead import with_dead_in_training
from sparseclt.evaluation.faithfulness import faithfulness
from sparseclt.evaluation.interaction import interaction_sparsity
from sparseclt.evaluation.metrics import Evaluation, evaluate
from sparseclt.evaluation.pruning import fvu_against_c
from sparseclt.graph.prompt_scores import prompt_scores
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.parallel import ONE_RANK, Ranks
from sparseclt.storage.checkpoint import latest
from sparseclt.storage.json_files import replace_file, replace_json
from sparseclt.training import memory
from sparseclt.training.grid import available_to_rank
from sparseclt.training.loggers import read_metrics
from sparseclt.training.run_directory import METRICS
from sparseclt.training.several_ranks import on_ranks

PRUNING_TOKENS = 32_768  # held-out tokens for the curve of FVU against C
INTERACTION_TOKENS = 16_384  # and for that of the KL divergence, half of them to rank edges on


def measure(
    config: TrainConfig,
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    checkpoint: Path | None = None,
    *,
    cross_entropy: bool = True,
) -> Evaluation:
    """Evaluate `clt`, that of `checkpoint` or of the last one, on `rows` [R, S]; write tables and plots into the run
    directory, on the first of several ranks. Without `cross_entropy`, which takes most of the time, that is left
    out."""
    run, at_a_time = Path(config.out), rows_at_a_time(config, language_model, clt.ranks)
    result = evaluate(
        clt, language_model, rows, batch_rows=at_a_time, cross_entropy=cross_entropy, backend=config.compute.backend
    )
    if counters := checkpoint or latest(run):
        result = with_dead_in_training(result, counters)
    if clt.connected and clt.reads_upstream and len(rows) > 1:
        points = pruned(config, clt, language_model, rows, _ladder(clt))
        result = replace(result, fvu_against_C=points)
    if not clt.ranks.first:
        return result
    if result.fvu_against_C:
        title = "The trained CLT with its connections chosen anew for each C, not trained on"
        plots.fvu_against_c(result.fvu_against_C, run / "fvu_against_c.png", title=title)
    plots.densities(result.to_dict(), run / "density.png")
    replace_json(run / "evaluation.json", result.to_dict())
    replace_file(run / "table.md", report.evaluation_table(result.to_dict()) + "\n")
    if (run / METRICS).is_file():  # an imported CLT has none
        plots.loss_curves(read_metrics(run / METRICS), run / "loss.png")
    return result


def pruned(config: TrainConfig, clt: SparseCLT, language_model: LanguageModel, rows: Tensor, Cs: Sequence[int]):
    """FVU of `clt` with the best C connections for each of `Cs`, on some of `rows` [R, S]."""
    few = rows[: max(2, PRUNING_TOKENS // rows.shape[1])]
    importance, at_a_time = config.connections.importance, rows_at_a_time(config, language_model, clt.ranks)
    return fvu_against_c(
        clt, language_model, few, Cs, importance=importance, batch_rows=at_a_time, backend=config.compute.backend
    )


def measure_faithfulness(
    config: TrainConfig, clt: SparseCLT, language_model: LanguageModel, rows: Tensor
) -> dict[str, Any]:
    """The faithfulness of `clt` on some of `rows` [R, S], the first ones as prompts; writes the table into the run
    directory."""
    run, few = Path(config.out), rows[: max(1, PRUNING_TOKENS // rows.shape[1])]
    at_a_time = max(1, rows_at_a_time(config, language_model) // 4)  # three models' logits are alive
    measured = faithfulness(clt, language_model, few, batch_rows=at_a_time, backend=config.compute.backend)
    figures = measured.to_dict() | {"graphs": asdict(prompt_scores(clt, language_model, rows))}
    replace_json(run / "faithfulness.json", figures)
    replace_file(run / "faithfulness.md", report.faithfulness_table(figures) + "\n")
    return figures


def measure_interaction(
    config: TrainConfig, clt: SparseCLT, language_model: LanguageModel, rows: Tensor
) -> dict[str, Any]:
    """The interaction sparsity of `clt` on some of `rows` [R, S]; writes table and plot into the run directory."""
    run, few = Path(config.out), rows[: max(2, INTERACTION_TOKENS // rows.shape[1])]
    at_a_time = max(1, rows_at_a_time(config, language_model) // 4)  # two models' logits are alive
    figures = interaction_sparsity(
        clt, language_model, few, importance=config.connections.importance, batch_rows=at_a_time,
        backend=config.compute.backend,
    ).to_dict()  # fmt: skip
    replace_json(run / "interaction.json", figures)
    replace_file(run / "interaction.md", report.interaction_table(figures) + "\n")
    plots.interaction({run.resolve().name: figures["curve"]}, run / "interaction.png")
    return figures


def rows_at_a_time(config: TrainConfig, language_model: LanguageModel, ranks: Ranks = ONE_RANK) -> int:
    """How many rows an evaluation takes at a time, so that it fits into the memory that is left on all `ranks`."""
    config, available = on_ranks(config, ranks), available_to_rank(language_model.device)
    return min(ranks.world.objects(memory.evaluation_rows(config, language_model.shape, available)))


def held_out_rows(config: TrainConfig, language_model: LanguageModel) -> Tensor:
    """Rows [R, S] for evaluation."""
    rows = load_rows(config, language_model.tokenizer, "held_out")
    check_token_ids(rows, language_model.shape.vocab, language_model.tokenizer)
    return rows[: max(1, config.data.held_out_tokens // rows.shape[1])]


def _ladder(clt: SparseCLT) -> list[int]:
    """C = 1, 2, 4, ... up to twice the connections that the CLT was trained with."""
    trained = max(module.connections.C for module in clt if module.connections)
    most = max(module.upstream for module in clt)
    return sorted({C for C in (2**i for i in range(20)) if C <= min(max(2 * trained, 1), most)} | {trained})
