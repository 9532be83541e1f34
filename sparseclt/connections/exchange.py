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
from sparseclt.parallel.collectives import side_by_side
from sparseclt.parallel.select_connections import TILE_BYTES


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
        gains = _largest_gains(clt, recent, reader, E, most, bytes_at_a_time)
        result[reader.index] = _exchanged(*gains, reader.connections.indices, logits, price)
    return result


def _exchanged(gains: Tensor, ids: Tensor, candidates: Tensor, logits: Tensor, price: float) -> Exchange:
    """Of all latents those candidates [F, C] that are most closed, in exchange for `ids` [F, most], which have the
    largest `gains`."""
    lowest = logits.topk(ids.shape[1], dim=1, largest=False)
    taken = (lowest.values <= 0) & (gains > price)
    new = torch.zeros_like(candidates, dtype=torch.bool).scatter_(1, lowest.indices, taken)
    ids = torch.where(taken, ids.to(candidates.dtype), candidates.gather(1, lowest.indices))
    return Exchange(candidates.scatter(1, lowest.indices, ids), new)


def _largest_gains(
    clt: Transcoders, recent: RecentGradients, reader: Reader, E: Tensor, most: int, bytes_at_a_time: int
) -> tuple[Tensor, Tensor]:
    """The largest gains [F, most] of upstream latents that are no candidates yet, in descending order, and their ids.

    On several ranks those of this rank's latents: effective decoders are gathered a tile of upstream latents at a time.
    """
    assert reader.connections is not None
    candidates, group = reader.connections.indices, reader.group
    R, most = len(candidates), min(most, len(E), candidates.shape[1])
    gains, ids = E.new_empty(R, 0), torch.empty(R, 0, dtype=torch.int64, device=E.device)
    whole = len(E) * E[0].nbytes
    for tile in chunks(len(E), group.size * E[0].nbytes, whole if group.alone else TILE_BYTES):
        decoders = side_by_side(E[tile], group)
        parts = []
        for rows in chunks(R, 3 * len(decoders) * E.element_size(), bytes_at_a_time):
            gain = _gain(clt, recent, reader, decoders, rows, tile)
            place = candidates[rows].long() - tile.start
            row, slot = ((place >= 0) & (place < len(decoders))).nonzero(as_tuple=True)
            gain[row, place[row, slot]] = -torch.inf
            parts.append(gain.topk(min(most, len(decoders)), dim=1))
        found, places = (torch.cat(both) for both in zip(*parts, strict=True))
        gains, order = torch.cat([gains, found], 1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([ids, places + tile.start], 1).gather(1, order)
        gains, ids = gains[:, :most], ids[:, :most]
    return gains, ids


def _gain(
    clt: Transcoders, recent: RecentGradients, reader: Reader, decoders: Tensor, rows: slice, ids: slice
) -> Tensor:
    """-V dL/dV [rows, ids], over heads the sum: by how much opening each connection of this rank's latents `rows` to
    the upstream latents `ids`, which have `decoders`, lowers the loss, to first order."""
    F, W_enc = clt.architecture.latents, clt.reading_rows(reader.index).detach()[rows].to(decoders.dtype)
    weights, first = reader.attention, clt.transcoder(reader.index).rows.start
    of_all = slice(first + rows.start, first + rows.stop)
    heads = W_enc[None] if weights is None else rows_of_heads(W_enc, weights)
    gain = decoders.new_zeros(len(W_enc), len(decoders))
    for head, carried in enumerate(heads):
        gradient = recent.gradient_with(reader.index, of_all, ids, F, head)
        gain -= (carried @ decoders.T).mul_(gradient)
    return gain
