"""Candidates for learned connections, exchanged for those whose opening would lower the loss more."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparseclt.connections.gradients import RecentGradients
from sparseclt.model.cross_layer import Reader, effective_decoders
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops.scratch import SELECTION_BYTES
from sparseclt.parallel.select_connections import best_of_shares


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
    size F x U is allocated. None for modules without logits. Of a CLT that is spread over ranks: those of this rank's
    latents.
    """
    result: list[Exchange | None] = [None] * len(clt.sites)
    for reader, E in effective_decoders(clt.readers(), clt.sites, [m.W_dec.detach() for m in clt]):
        logits = clt.transcoder(reader.index).logits
        if logits is None:
            continue
        assert reader.connections is not None
        C = min(most, len(E), logits.shape[1])
        best = partial(_best, clt, recent, reader, C)
        rows = reader.carried(clt.reading_rows(reader.index).detach().to(E.dtype))
        found = best_of_shares(rows, E, best, C, group=reader.group, scratch_bytes=bytes_at_a_time // 3)
        result[reader.index] = _exchanged(*found, reader.connections.indices, logits, price)
    return result


def _exchanged(ids: Tensor, gains: Tensor, candidates: Tensor, logits: Tensor, price: float) -> Exchange:
    """Of all latents those candidates [F, C] that are most closed, in exchange for `ids` [F, most], which have the
    largest `gains`."""
    lowest = logits.topk(ids.shape[1], dim=1, largest=False)
    taken = (lowest.values <= 0) & (gains > price)
    new = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, lowest.indices, taken)
    ids = torch.where(taken, ids.to(candidates.dtype), candidates.gather(1, lowest.indices))
    return Exchange(candidates.scatter(1, lowest.indices, ids), new)


def _best(
    clt: Transcoders,
    recent: RecentGradients,
    reader: Reader,
    C: int,
    encoders: Tensor,
    decoders: Tensor,
    rows: slice,
    columns: slice,
) -> tuple[Tensor, Tensor]:
    """`parallel.select_connections.Best` by what opening a connection would gain, of those that are no candidates."""
    assert reader.all_connections is not None
    gain = _gain(clt, recent, reader, encoders, decoders, rows, columns)
    place = reader.all_connections.indices[rows].long() - columns.start
    row, slot = ((place >= 0) & (place < len(decoders))).nonzero(as_tuple=True)
    gain[row, place[row, slot]] = -torch.inf
    gains, ids = gain.topk(min(C, len(decoders)), dim=1)
    return ids, gains


def _gain(
    clt: Transcoders,
    recent: RecentGradients,
    reader: Reader,
    encoders: Tensor,
    decoders: Tensor,
    rows: slice,
    columns: slice,
) -> Tensor:
    """-V dL/dV [rows, columns], over heads the sum: by how much opening each connection of latents `rows`, which have
    `encoders`, to the upstream latents `columns`, which have `decoders`, lowers the loss, to first order."""
    F, heads = clt.architecture.latents, encoders if encoders.ndim == 3 else encoders[None]
    gain = decoders.new_zeros(heads.shape[1], len(decoders))
    for head, carried in enumerate(heads):
        gradient = recent.gradient_with(reader.index, rows, columns, F, head)
        gain -= (carried @ decoders.T).mul_(gradient)
    return gain
