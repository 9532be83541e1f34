"""Interaction sparsity: how few connections between latents the replaced model's predictions need."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log2
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import Importance
from sparseclt.connections.activity import Activity
from sparseclt.connections.selection import no_connections, select_top_connections
from sparseclt.evaluation.agreement import AgreementSums
from sparseclt.evaluation.metrics import captures, modes_of
from sparseclt.evaluation.reconnected import Chosen, activity_on, checked, connected
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT, in_evaluation_mode
from sparseclt.model.forward import ForwardPass
from sparseclt.model.replacement import hooks
from sparseclt.model.sites import Mode, Open
from sparseclt.ops.rows import chunks
from sparseclt.ops.scratch import SELECTION_BYTES

LADDER = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)  # connections kept per latent


@dataclass(frozen=True, kw_only=True)
class Point:
    """The replaced model with some connections kept."""

    kept: int
    """The most connections kept per latent."""
    edges: int
    """Those of all latents together."""
    kl: float
    """Mean KL divergence from the language model's next-token probabilities to the replaced model's, in nats."""
    top1: float
    """Share of tokens behind which both find the same next token likeliest."""


@dataclass(frozen=True, kw_only=True)
class InteractionSparsity:
    """What `interaction_sparsity` measured."""

    tokens: int
    """Held-out tokens that the curve is measured on, without position 0 of each row."""
    edges: str
    """Which edges there are: "own", the CLT's connections, or "all" pairs of latents, for a CLT without any."""
    curve: tuple[Point, ...]
    """In rising order of connections kept, from none."""
    kl_all: float
    """KL divergence with every edge kept: what reconstruction costs, however dense the graph."""
    kl_vanilla: float
    """KL divergence of vanilla mode, whose latents read the replaced run itself."""
    area: float
    """Area under the KL divergence against log2(1 + connections kept per latent), from none to 256, over its width: the
    mean KL on that axis, in nats. Lower is better: faithful and sparse at once."""
    relative_area: float | None
    """The same of the share of the edges' effect that is lost, (KL - `kl_all`) / (KL without edges - `kl_all`): 0 if no
    edges are needed, 1 if the last ones matter as much as the first. It leaves out how good the reconstruction is.
    None where edges do not help."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which serialise to JSON."""
        return asdict(self)


@in_evaluation_mode
@torch.no_grad()
def interaction_sparsity(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    *,
    importance: Importance = "coactivation",
    batch_rows: int = 16,
    backend: str | None = None,
) -> InteractionSparsity:
    """KL divergence of the replaced model, in sparsely-connected mode, against connections kept per latent, which are
    0, 1, 2, 4, ... 256 of the most important ones; the others are ablated to zero, and nothing is trained.

    The edges of a CLT with connections are these; those of a CLT without, whether cross-layer or per-layer, are all
    pairs of a latent with an upstream one. Both are ranked, latent by latent, by the `importance` that connections are
    chosen by, on every other row of `rows` [R, S]; the curve is measured on the rest.

    After "SCALAR: Benchmarking SAE Interaction Sparsity in Toy LLMs" (arXiv 2511.07572), which ranks the connections
    between the SAEs of two neighbouring places, ablates them down to a number kept, and takes the area under the KL
    divergence. As far as abstract and public code say, it differs from this in five ways: edges there are between one
    pair of SAEs at a time, the rest of the model being its own, here between all modules at once, so that errors
    compound; they are ranked over the whole pair, here for each latent; by attribution, here by |V| and co-activation;
    the KL divergence there is from the replaced model with all its edges, here from the language model, so that poor
    reconstruction is no advantage (`relative_area` is about edges only); and the axis here is logarithmic. The two sets
    of figures cannot be compared.
    """
    if not clt.reads_upstream:
        raise ValueError("clt: expected at least two modules, between which there are connections, got one")
    if len(rows) < 2:
        raise ValueError(f"rows: expected at least 2, one to rank edges on and one to measure on, got {len(rows)}")
    own = len(modes_of(clt)) > 1
    activity = activity_on(clt, language_model, rows[::2], batch_rows, backend, importance)
    rank = own_connections_ranked if own else _most_important_pairs
    ranked = rank(clt, activity, importance, backend)
    widest = max((ids.shape[1] for ids in ranked if ids is not None), default=0)
    few = {
        kept: checked(clt, [None if ids is None else ids[:, :kept] for ids in ranked])
        for kept in {min(kept, widest) for kept in LADDER} | {widest}
    }
    sums, tokens = AgreementSums(), 0
    for batch, activations in captures(clt, language_model, rows[1::2], batch_rows):
        tokens += activations.counted_tokens
        real = language_model.replaced_logits(batch)
        replaced = _Replaced(clt, language_model, batch, backend)
        sums.add("vanilla", real, replaced.logits("vanilla"))
        if not own:
            sums.add("all", real, replaced.logits("sparse", opened="all"))
        for kept, connections in few.items():
            sums.add(str(kept), real, replaced.logits("sparse", connections))
    means = sums.means()
    curve = tuple(
        Point(kept=kept, edges=_edges(few[min(kept, widest)]), **asdict(means[str(min(kept, widest))]))
        for kept in LADDER
    )
    points, kl_all = [(point.kept, point.kl) for point in curve], means[str(widest) if own else "all"].kl
    return InteractionSparsity(
        tokens=tokens, edges="own" if own else "all", curve=curve, kl_all=kl_all, kl_vanilla=means["vanilla"].kl,
        area=area(points), relative_area=relative_area(points, kl_all),
    )  # fmt: skip


@dataclass
class _Replaced:
    """Runs of the language model on one batch with its outputs replaced."""

    clt: SparseCLT
    language_model: LanguageModel
    batch: Tensor
    backend: str | None

    def logits(self, mode: Mode, connections: Chosen | None = None, opened: Open = "own") -> Tensor:
        with connected(self.clt, connections):
            forward = ForwardPass(self.clt, mode, self.backend, open_connections=opened)
            return self.language_model.replaced_logits(self.batch, **hooks(forward))


def area(points: Sequence[tuple[int, float]]) -> float:
    """The mean of y on the axis log2(1 + x), by trapezoids between `points` (x, y) in rising order."""
    places = [log2(1 + x) for x, _ in points]
    parts = [(places[i + 1] - places[i]) * (points[i][1] + points[i + 1][1]) / 2 for i in range(len(points) - 1)]
    return sum(parts) / (places[-1] - places[0])


def relative_area(points: Sequence[tuple[int, float]], floor: float) -> float | None:
    """`area` of (y - floor) / (y of the first point - floor); None if the first is not above the floor."""
    first = points[0][1]
    return None if first <= floor else area([(x, (y - floor) / (first - floor)) for x, y in points])


def _most_important_pairs(
    clt: SparseCLT, activity: Activity, importance: Importance, backend: str | None
) -> list[Tensor | None]:
    """For every module the upstream latents [F, C] that matter most to each of its latents, the most important first,
    as many as the curve needs."""
    return select_top_connections(clt, activity, LADDER[-1], importance, backend)


def own_connections_ranked(
    clt: SparseCLT, activity: Activity, importance: Importance, backend: str | None
) -> list[Tensor | None]:
    """The open connections [F, C] of every module, the most important first, -1 where a latent has fewer."""
    ranked: list[Tensor | None] = []
    for m, (module, V) in enumerate(zip(clt, clt.virtual_weights(backend), strict=True)):
        ids, opened = module.connection_indices, module.open_connections()
        if V is None or ids is None or opened is None:
            ranked.append(no_connections(clt)[m])
            continue
        strength = (V if V.dim() == 2 else V.norm(dim=0)) * _statistic(clt, m, ids, activity, importance)
        order = strength.abs().masked_fill(~opened, -1.0).argsort(dim=1, descending=True, stable=True)
        ranked.append(torch.where(opened, ids, -1).gather(1, order))
    return ranked


def _statistic(clt: SparseCLT, m: int, ids: Tensor, activity: Activity, importance: Importance) -> Tensor:
    """s of each connection [F, C] of module `m`, as in `select_top_connections`."""
    upstream = clt.upstream[m]
    if importance == "coactivation":
        parts = [
            activity.coactivation(m, part, upstream).gather(1, ids[part].clamp_min(0))
            for part in chunks(len(ids), 4 * clt.transcoder(m).upstream, SELECTION_BYTES)
        ]
        return torch.cat(parts)
    return activity.magnitude(importance)[:upstream].flatten()[ids.clamp_min(0)]


def _edges(connections: Chosen) -> int:
    return sum(int((c.indices >= 0).sum()) for c in connections if c is not None)
