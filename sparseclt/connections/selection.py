"""The upstream latents that matter most to each latent, found by streaming tiles."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseclt import ops
from sparseclt.config import Budget, Importance
from sparseclt.connections.activity import Activity
from sparseclt.connections.over_ranks import most_important_of_rank
from sparseclt.model.cross_layer import Reader, effective_decoders
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops.rows import chunks
from sparseclt.ops.scratch import SELECTION_BYTES
from sparseclt.parallel.collectives import gather_rows
from sparseclt.parallel.group import ALONE, Group
from sparseclt.parallel.select_connections import strength

LEAST, MOST = 2, 4  # connections of a latent where a module's latents share theirs: at least, and at most times C


def select_top_connections(
    clt: Transcoders,
    activity: Activity,
    C: int,
    importance: Importance = "coactivation",
    backend: str | None = None,
    budget: Budget = "latent",
) -> list[Tensor | None]:
    """For every module the C upstream latents [F, C] that matter most to each of its latents.

    Importance of (i, j) is |V[i, j]| x s, over heads the root of the sum of squares for an attention reader. s is
    the running "mean" or "rms" of z_j, or with "coactivation" the mean of z_j over the tokens on which latent i
    fires; for an attention reader, at the keys that it attends to from there (`Activity.coactivation`).
    With `budget` "module" the F C connections of a module are shared out (`shared_out`): [F, at most 4 C].
    A module with fewer than C upstream latents keeps all of them; None without any upstream. Streams tiles: nothing of
    size F x U is allocated. Of a CLT that is spread over ranks: those of this rank's latents.
    """
    if C == 0:
        return no_connections(clt)
    chosen: list[Tensor | None] = [None] * len(clt.sites)
    if not clt.ranks.latents.alone:
        most = MOST * C if budget == "module" else C
        for reader, ids, strengths in most_important_of_rank(clt, activity, most, importance, backend):
            chosen[reader.index] = ids
            if budget == "module":
                costs, U = _costs(clt, activity, reader.index, strengths), clt.transcoder(reader.index).upstream
                chosen[reader.index] = shared_out(ids, costs, min(C, U), reader.group)
        return chosen
    decoders = [m.W_dec.detach() for m in clt]
    for reader, E in effective_decoders(clt.readers(), clt.sites, decoders):
        rows, keep = reader.carried(clt.reading_rows(reader.index).detach().to(E.dtype)), min(C, len(E))
        if budget == "module":
            parts = _by_coactivation(activity, reader, rows, E, min(MOST * C, len(E)), backend)
            found = ((ids, strength(rows[..., part, :], E, ids, s, backend)) for part, ids, s in parts)
            ids, strengths = map(torch.cat, zip(*found, strict=True))
            chosen[reader.index] = shared_out(ids, _costs(clt, activity, reader.index, strengths), keep)
        elif importance == "coactivation":
            parts = _by_coactivation(activity, reader, rows, E, keep, backend)
            chosen[reader.index] = torch.cat([ids for _, ids, _ in parts])
        else:
            s = activity.magnitude(importance)[: reader.upstream_modules].flatten().to(E.dtype)
            chosen[reader.index] = ops.select_connections(rows, E, s, keep, backend=backend)
    return chosen


def shared_out(ids: Tensor, costs: Tensor, C: int, group: Group = ALONE) -> Tensor:
    """Of upstream latents `ids` [F, M] those F C whose loss would cost the most, `costs` [F, M]: [F, at most M], with
    -1 in empty slots. Every latent keeps its first `LEAST`: one that fires rarely would die without any. In a `group`
    each rank has its own rows of all of these."""
    least = min(LEAST, C)
    costs = torch.cat([torch.full_like(costs[:, :least], torch.inf), costs[:, least:]], 1)
    of_all = gather_rows(costs, group)
    kept = torch.zeros_like(of_all, dtype=torch.bool)
    kept.view(-1)[of_all.flatten().topk(min(len(of_all) * C, of_all.numel())).indices] = True
    most = int(kept.sum(1).max())
    kept = kept.unflatten(0, (group.size, -1))[group.rank]
    first = kept.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
    return torch.where(kept, ids, -1).gather(1, first)


def _by_coactivation(
    activity: Activity, reader: Reader, rows: Tensor, E: Tensor, keep: int, backend: str | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A few rows of the reader at a time: which, their `keep` most important upstream latents [rows, keep], and the
    co-activation [rows, U] that they were chosen by."""
    for part in chunks(rows.shape[-2], len(E) * rows.element_size(), SELECTION_BYTES):
        s = activity.coactivation(reader.index, part, reader.upstream_modules).to(E.dtype)
        yield part, ops.select_connections(rows[..., part, :], E, s, keep, backend=backend), s


def _costs(clt: Transcoders, activity: Activity, module: int, strengths: Tensor) -> Tensor:
    """What it would cost, up to a factor, to leave out connections of a module's latents, [F, M].

    That is the square of their `strengths`, which are errors of the latent's pre-activation, times how much the latent
    writes, as a share of what its module writes to each target, times the root of how often it fires: the number itself
    would leave rare latents with too few, and they would die. Of a CLT that is spread over ranks: of this rank's."""
    own = clt.transcoder(module)
    written = own.group.sum_(own.W_dec.detach().float().square().sum(2))
    share = (written / written.mean(0).clamp_min(torch.finfo(written.dtype).tiny)).sum(1)
    return strengths.square() * (activity.firings(module).sqrt() * share)[own.rows, None]


def no_connections(clt: Transcoders) -> list[Tensor | None]:
    """For every module with upstream modules an empty list [F, 0] of connections, as C = 0 leaves it."""
    return [m.W_enc.new_empty(len(m.W_enc), 0, dtype=torch.int64) if m.upstream else None for m in clt]


def random_connections(clt: Transcoders, C: int, seed: int) -> list[Tensor | None]:
    """For every module C distinct upstream latents [F, C] of each latent (all, if there are fewer), all equally likely;
    None without any upstream. The same for the same seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    chosen = no_connections(clt)
    for index, module in enumerate(clt):
        if not module.upstream or not C:
            continue
        parts = []
        for part in chunks(module.latents, 4 * module.upstream, SELECTION_BYTES):
            draws = torch.rand(part.stop - part.start, module.upstream, generator=generator)
            parts.append(draws.topk(min(C, module.upstream), dim=1).indices)
        chosen[index] = torch.cat(parts)[module.rows].to(module.W_enc.device)
    return chosen
