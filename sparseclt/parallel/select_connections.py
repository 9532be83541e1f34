"""The connections worth keeping of encoder rows and decoder columns that are spread over ranks."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from sparseclt import ops
from sparseclt.ops.rows import chunks
from sparseclt.parallel.group import Group

TILE_BYTES = 64 << 20  # of rows that are gathered at a time

# Importance [rows, columns] of upstream latents `columns` for the latents `rows`, of all that ranks have.
Importance = Callable[[slice, slice], Tensor]
# Of latents with encoder rows [R, D] or [H, R, D], numbered `rows` among all, the best of the upstream latents
# `columns`, which have whole decoders [U/n, D]: ids, counted from the first of these, and scores, as many as C, or all.
Best = Callable[[Tensor, Tensor, slice, slice], tuple[Tensor, Tensor]]


def select_connections(
    W_enc: Tensor,
    E: Tensor,
    importance: Importance,
    C: int,
    *,
    group: Group | dist.ProcessGroup | None,
    backend: str | None = None,
    tile_bytes: int = TILE_BYTES,
    scratch_bytes: int = TILE_BYTES,
) -> Tensor:
    """Upstream ids [F/n, C] int64 of this rank's latents with the largest importance x |virtual weight|, best first.

    Equivalent to this rank's rows of `ops.select_connections(all W_enc, all E, all importances, C)`. Each rank takes
    U/n of the upstream latents, whose columns the ranks exchange for whole rows, and finds the C best of these for all
    F latents, whose encoder rows are gathered a tile at a time; of what the ranks found, each then takes the C best for
    its own latents. A rank sends about U D / n + F D + 2 F C numbers.

    `W_enc` [F/n, D] or [H, F/n, D]: this rank's rows; `E` [U, D/n]: this rank's columns; `importance`: a function that
    gives [rows, columns] of all latents. `tile_bytes` bounds a tile, `scratch_bytes` its importances; both must be the
    same on all ranks. `group`: a `torch.distributed` process group, or None for one rank. Errors as in
    `ops.select_connections`.
    """
    best = partial(most_important, importance=importance, C=C, backend=backend)
    sizes = {"tile_bytes": tile_bytes, "scratch_bytes": scratch_bytes}
    return best_of_shares(W_enc, E, best, C, group=Group.of(group), **sizes)[0]


@torch.no_grad()
def best_of_shares(
    W_enc: Tensor,
    E: Tensor,
    best: Best,
    C: int,
    *,
    group: Group,
    tile_bytes: int = TILE_BYTES,
    scratch_bytes: int = TILE_BYTES,
) -> tuple[Tensor, Tensor]:
    """The C upstream latents [F/n, C] of each of this rank's latents with the largest scores, best first, and their
    scores; by what `best` finds in each rank's share of the upstream latents. The rest as in `select_connections`."""
    rows, share = W_enc.shape[-2], group.part(len(E), "upstream latents")
    decoders = _own_rows(E, group, tile_bytes)
    found = [(W_enc.new_empty(0, C, dtype=torch.int64), W_enc.new_empty(0, C, dtype=E.dtype))]
    for tile in chunks(rows, group.size * W_enc[..., :1, :].nbytes, tile_bytes):
        encoders = group.gather(W_enc[..., tile, :])  # of each rank some rows
        of_share = [
            best(encoders[rank][..., part, :], decoders, of_all, share)
            for rank in range(group.size)
            for part, of_all in _parts(rank * rows, tile, decoders, scratch_bytes)
        ]
        # For each rank's rows what this one found; then for this one's what each rank found, of increasing ids.
        ids, scores = (torch.cat(both).unflatten(0, (group.size, -1)) for both in zip(*of_share, strict=True))
        narrow = torch.int32 if len(E) < 2**31 else torch.int64
        ids = group.exchange((ids + share.start).to(narrow)).transpose(0, 1).flatten(1).long()
        scores, order = group.exchange(scores).transpose(0, 1).flatten(1).sort(dim=1, descending=True, stable=True)
        found.append((ids.gather(1, order[:, :C]), scores[:, :C]))  # of equal ones the lowest id first
    ids, scores = (torch.cat(both) for both in zip(*found, strict=True))
    return ids, scores


def _own_rows(E: Tensor, group: Group, tile_bytes: int) -> Tensor:
    """This rank's share of the whole rows, [U/n, D], of its columns [U, D/n]."""
    if group.alone:
        return E
    by_rank = E.unflatten(0, (group.size, -1))  # [n, U/n, D/n]: the rows that each rank will have
    whole = E.new_empty(by_rank.shape[1], group.size * E.shape[1])
    for tile in chunks(len(whole), whole[:1].nbytes, tile_bytes):
        whole[tile] = group.exchange(by_rank[:, tile]).transpose(0, 1).flatten(1)
    return whole


def _parts(first: int, tile: slice, decoders: Tensor, scratch_bytes: int) -> list[tuple[slice, slice]]:
    """A tile of a rank's rows in parts whose importances fit into `scratch_bytes`: where they are in the tile, and
    among all latents, of which the rank has those from `first` on."""
    parts = chunks(tile.stop - tile.start, len(decoders) * decoders.element_size(), scratch_bytes)
    begin = first + tile.start
    return [(part, slice(begin + part.start, begin + part.stop)) for part in parts]


def most_important(
    rows: Tensor, decoders: Tensor, of_all: slice, share: slice, importance: Importance, C: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """`Best` by importance x |virtual weight|."""
    s = importance(of_all, share)
    ids = ops.select_connections(rows, decoders, s, min(C, len(decoders)), backend=backend)
    return ids, strength(rows, decoders, ids, s, backend)


def strength(rows: Tensor, decoders: Tensor, ids: Tensor, s: Tensor, backend: str | None) -> Tensor:
    """Importance `s` [R, U] x |virtual weight| of connections `ids` [R, C], over heads the root of the sum of squares,
    of encoder rows [R, D] or [H, R, D] and whole decoders [U, D]."""
    heads = rows if rows.ndim == 3 else rows[None]
    V = torch.stack([ops.virtual_weights(head.contiguous(), decoders, ids, backend=backend) for head in heads])
    return V.norm(dim=0) * s.gather(1, ids)
