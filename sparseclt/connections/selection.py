"""The upstream latents that matter most to each latent, found by streaming tiles."""

import torch
from torch import Tensor

from sparseclt import ops
from sparseclt.config import Importance
from sparseclt.connections.activity import Activity
from sparseclt.connections.over_ranks import select_of_rank
from sparseclt.model.attention import rows_of_heads
from sparseclt.model.cross_layer import effective_decoders
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops.rows import chunks
from sparseclt.ops.scratch import SELECTION_BYTES


def select_top_connections(
    clt: Transcoders, activity: Activity, C: int, importance: Importance = "coactivation", backend: str | None = None
) -> list[Tensor | None]:
    """For every module the C upstream latents [F, C] that matter most to each of its latents.

    Importance of (i, j) is |V[i, j]| x s, over heads the root of the sum of squares for an attention reader. s is
    the running "mean" or "rms" of z_j, or with "coactivation" the mean of z_j over the tokens on which latent i
    fires; for an attention reader, at the keys that it attends to from there (`Activity.coactivation`).
    A module with fewer than C upstream latents keeps all of them; None without any upstream. Streams tiles: nothing of
    size F x U is allocated. Of a CLT that is spread over ranks: those of this rank's latents.
    """
    if C == 0:
        return no_connections(clt)
    if not clt.ranks.latents.alone:
        return select_of_rank(clt, activity, C, importance, backend)
    chosen: list[Tensor | None] = [None] * len(clt.sites)
    decoders = [m.W_dec.detach() for m in clt]
    for reader, E in effective_decoders(clt.readers(), clt.sites, decoders):
        rows, keep = clt.reading_rows(reader.index).detach().to(E.dtype), min(C, len(E))
        if reader.attention is not None:
            rows = rows_of_heads(rows, reader.attention)
        if importance == "coactivation":
            parts = []
            for part in chunks(rows.shape[-2], len(E) * rows.element_size(), SELECTION_BYTES):
                s = activity.coactivation(reader.index, part, reader.upstream_modules).to(E.dtype)
                parts.append(ops.select_connections(rows[..., part, :], E, s, keep, backend=backend))
            chosen[reader.index] = torch.cat(parts)
            continue
        s = activity.magnitude(importance)[: reader.upstream_modules].flatten().to(E.dtype)
        chosen[reader.index] = ops.select_connections(rows, E, s, keep, backend=backend)
    return chosen


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
