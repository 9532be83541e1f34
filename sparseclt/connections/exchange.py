"""Candidates for learned connections, exchanged for those whose opening would lower the loss more."""

from typing import NamedTuple

import torch
from torch import Tensor

from sparseclt.connections.gradients import RecentGradients
from sparseclt.model.attention import rows_of_heads
from sparseclt.model.cross_layer import Reader, effective_decoders
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops.rows import chunks
from sparseclt.ops.scratch import SELECTION_BYTES


class Exchange(NamedTuple):
    """The new connections [F, C] of a module, and which of them are new, boolean [F, C]."""

    connections: Tensor
    new: Tensor


@torch.no_grad()
def exchanged_candidates(
    clt: Transcoders, recent: RecentGradients, price: float, most: int, bytes_at_a_time: int = SELECTION_BYTES
) -> list[Exchange | None]:
    """For every module its candidates, of which at most `most` per latent are exchanged: closed ones for those whose
    opening would, to first order, lower the loss of a batch the most, and by more than `price`.

    Opening connection (i, j) changes the loss by V_ij dL/dV_ij, the gradient being the same for a closed connection as
    for an open one: Evci et al., "Rigging the Lottery" (2020), grow connections in this way. Streams tiles: nothing of
    size F x U is allocated. None for modules without logits.
    """
    result: list[Exchange | None] = [None] * len(clt.sites)
    F = clt.architecture.latents
    for reader, E in effective_decoders(clt.readers(), clt.sites, [m.W_dec.detach() for m in clt]):
        logits = clt.transcoder(reader.index).logits
        if logits is None:
            continue
        parts = []
        for rows in chunks(F, 3 * len(E) * E.element_size(), bytes_at_a_time):
            gain = _gain(clt, recent, reader, E, rows)
            assert reader.connections is not None
            parts.append(_exchanged(gain, reader.connections.indices[rows], logits[rows], price, most))
        result[reader.index] = Exchange(*map(torch.cat, zip(*parts, strict=True)))
    return result


def _exchanged(gain: Tensor, candidates: Tensor, logits: Tensor, price: float, most: int) -> Exchange:
    """Of some latents: those candidates [rows, C] that are most closed, in exchange for the largest gains [rows, U]."""
    gain.scatter_(1, candidates.clamp_min(0), -torch.inf)
    best = gain.topk(min(most, *gain.shape[1:], *logits.shape[1:]), dim=1)
    lowest = logits.topk(best.values.shape[1], dim=1, largest=False)
    taken = (lowest.values <= 0) & (best.values > price)
    new = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, lowest.indices, taken)
    ids = torch.where(taken, best.indices.to(candidates.dtype), candidates.gather(1, lowest.indices))
    return Exchange(candidates.scatter(1, lowest.indices, ids), new)


def _gain(clt: Transcoders, recent: RecentGradients, reader: Reader, E: Tensor, rows: slice) -> Tensor:
    """-V dL/dV [rows, U], over heads the sum: by how much opening each connection lowers the loss, to first order."""
    F, W_enc = clt.architecture.latents, clt.reading_rows(reader.index).detach()[rows].to(E.dtype)
    weights = reader.attention
    heads = W_enc[None] if weights is None else rows_of_heads(W_enc, weights)
    gain = E.new_zeros(len(W_enc), len(E))
    for head, carried in enumerate(heads):
        gradient = recent.gradient(reader.index, rows, reader.upstream_modules, F, head)
        gain -= (carried @ E.T).mul_(gradient)
    return gain
