"""FVU of a trained CLT with other numbers of connections, without further training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import Importance
from sparseclt.connections.selection import select_top_connections
from sparseclt.evaluation.metrics import ModuleMetrics, captures, mean_over_modules, module_row
from sparseclt.evaluation.over_ranks import add_up_, own_share
from sparseclt.evaluation.reconnected import activity_on, checked, connected
from sparseclt.evaluation.statistics import ModeStatistics, Variance
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT, in_evaluation_mode


@in_evaluation_mode
@torch.no_grad()
def fvu_against_c(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    Cs: Sequence[int],
    *,
    importance: Importance = "coactivation",
    batch_rows: int = 16,
    backend: str | None = None,
) -> list[dict[str, Any]]:
    """Choose each C's most important connections for the trained weights, without further training, and measure.

    Connections are chosen on every other row of `rows` [R, S] and measured on the rest. One entry per C: {"C",
    "fvu_vanilla", "fvu_sparse", "excess_fvu"}, means over modules as in `evaluate`. The CLT's own connections are
    put back.
    """
    if len(rows) < 2:
        raise ValueError(f"rows: expected at least 2, one to choose on and one to measure on, got {len(rows)}")
    activity = activity_on(clt, language_model, rows[::2], batch_rows, backend, importance)
    # Chosen best first: those of a smaller C are the first C. Checked and sorted here, once for all batches.
    best = select_top_connections(clt, activity, max(Cs), importance, backend)
    chosen = {C: checked(clt, [None if ids is None else ids[:, :C] for ids in best]) for C in Cs}
    variance, vanilla, sparse = Variance(clt), ModeStatistics(clt), {C: ModeStatistics(clt) for C in Cs}
    for _, activations in captures(clt, language_model, own_share(clt, rows[1::2]), batch_rows):
        real = activations.outputs(clt.sites)
        variance.add(real, activations.counted_flat)
        vanilla.add(clt(activations, "vanilla", backend=backend), real)
        for C in Cs:
            with connected(clt, chosen[C]):
                sparse[C].add(clt(activations, "sparse", backend=backend), real)
    add_up_(clt, [*variance.sums(), *(part for s in (vanilla, *sparse.values()) for part in s.sums())])
    points = []
    for C in Cs:
        statistics = {"vanilla": vanilla, "sparse": sparse[C]}
        modules = [ModuleMetrics(**module_row(clt, m, statistics, variance)) for m in range(len(clt.sites))]
        mean = mean_over_modules(modules)
        points.append(
            {"C": C, "fvu_vanilla": mean.fvu_vanilla, "fvu_sparse": mean.fvu_sparse, "excess_fvu": mean.excess_fvu}
        )
    return points
