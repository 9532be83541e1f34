"""FVU of a trained CLT with other numbers of connections, without further training."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import Importance
from sparseclt.connections.activity import Activity, RecentLatents
from sparseclt.connections.selection import select_top_connections
from sparseclt.evaluation.metrics import ModuleMetrics, captures, mean_over_modules, module_row
from sparseclt.evaluation.statistics import ModeStatistics, Variance
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT, in_evaluation_mode
from sparseclt.ops import Connections

Chosen = list[Connections | None]  # one entry per module; None without upstream modules


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
    activity = _activity_on(clt, language_model, rows[::2], batch_rows, backend)
    # Chosen best first: those of a smaller C are the first C. Checked and sorted here, once for all batches.
    best = list(zip(clt, select_top_connections(clt, activity, max(Cs), importance, backend), strict=True))
    chosen: dict[int, Chosen] = {
        C: [ids if ids is None else Connections(ids[:, :C], module.upstream) for module, ids in best] for C in Cs
    }
    variance, vanilla, sparse = Variance(clt), ModeStatistics(clt), {C: ModeStatistics(clt) for C in Cs}
    with _own_connections_kept(clt):
        for _, activations in captures(clt, language_model, rows[1::2], batch_rows):
            real = activations.outputs(clt.sites)
            variance.add(real, activations.counted_flat)
            vanilla.add(clt(activations, "vanilla", backend=backend), real)
            for C in Cs:
                for module, connections in zip(clt, chosen[C], strict=True):
                    module.connections = connections
                sparse[C].add(clt(activations, "sparse", backend=backend), real)
    points = []
    for C in Cs:
        statistics = {"vanilla": vanilla, "sparse": sparse[C]}
        modules = [ModuleMetrics(**module_row(clt, m, statistics, variance)) for m in range(len(clt.sites))]
        mean = mean_over_modules(modules)
        points.append(
            {"C": C, "fvu_vanilla": mean.fvu_vanilla, "fvu_sparse": mean.fvu_sparse, "excess_fvu": mean.excess_fvu}
        )
    return points


def _activity_on(
    clt: SparseCLT, language_model: LanguageModel, rows: Tensor, batch_rows: int, backend: str | None
) -> Activity:
    """Statistics of vanilla-mode latents on `rows` [R, S]."""
    M, a, device = len(clt.sites), clt.architecture, next(clt.parameters()).device
    recent = RecentLatents(clt.sites, a.slots, rows.numel(), device)
    activity = Activity(M, a.latents, device=device, recent=recent)
    for _, activations in captures(clt, language_model, rows, batch_rows):
        activity.observe(clt(activations, "vanilla", backend=backend).latents, activations)
    return activity


@contextmanager
def _own_connections_kept(clt: SparseCLT) -> Iterator[None]:
    """Without learned masks inside; the CLT's own connections and masks are put back at the end."""
    own = [(module.connections, module.logits) for module in clt]
    try:
        for module in clt:
            module.logits = None
        yield
    finally:
        for module, (connections, logits) in zip(clt, own, strict=True):
            module.connections, module.logits = connections, logits
