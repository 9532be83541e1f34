"""A trained CLT with other connections than its own, for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from sparseclt.config import Importance
from sparseclt.connections.activity import Activity, RecentLatents
from sparseclt.evaluation.metrics import captures
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.ops import Connections

Chosen = Sequence[Connections | None]
"""One entry per module; None without upstream modules."""


def checked(clt: SparseCLT, connections: Sequence[Tensor | None]) -> list[Connections | None]:
    """Connections [F, C] of every module, checked and sorted once for many batches."""
    return [
        None if ids is None else Connections(ids, module.upstream) for module, ids in zip(clt, connections, strict=True)
    ]


@contextmanager
def connected(clt: SparseCLT, connections: Chosen | None) -> Iterator[None]:
    """With `connections` instead of the CLT's own and without learned masks; None: as it is."""
    if connections is None:
        yield
        return
    own = [(module.connections, module.logits) for module in clt]
    try:
        for module, chosen in zip(clt, connections, strict=True):
            module.connections, module.logits = chosen, None
        yield
    finally:
        for module, (mine, logits) in zip(clt, own, strict=True):
            module.connections, module.logits = mine, logits


def activity_on(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    batch_rows: int,
    backend: str | None,
    importance: Importance,
) -> Activity:
    """Statistics of vanilla-mode latents on `rows` [R, S], as far as `importance` needs them."""
    M, a, device = len(clt.sites), clt.architecture, next(clt.parameters()).device
    recent = RecentLatents(clt.sites, a.slots, rows.numel(), device) if importance == "coactivation" else None
    activity = Activity(M, a.latents, device=device, recent=recent)
    for _, activations in captures(clt, language_model, rows, batch_rows):
        activity.observe(clt(activations, "vanilla", backend=backend).latents, activations)
    return activity
