"""The connections worth keeping of encoder rows and decoder columns that are spread over ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from sparseclt import ops
from sparseclt.ops.rows import chunks
from sparseclt.parallel.group import Group

TILE_BYTES = 64 << 20  # of effective decoders that are gathered at a time

# Importance [rows, columns] of upstream latents `columns` for this rank's latents `rows`.
Importance = Callable[[slice, slice], Tensor]


@torch.no_grad()
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

    Equivalent to this rank's rows of `ops.select_connections(all W_enc, all E, all importances, C)`. Effective decoders
    are gathered a tile of upstream latents at a time, once each: a rank sends U D numbers in all.

    `W_enc` [F/n, D] or [H, F/n, D]: this rank's rows; `E` [U, D/n]: this rank's columns; `importance`: a function that
    gives [rows, columns] of this rank's latents. `tile_bytes` bounds a tile, `scratch_bytes` its importances; both must
    be the same on all ranks. `group`: a `torch.distributed` process group, or None for one rank. Errors as in
    `ops.select_connections`.
    """
    group = Group.of(group)
    rows = W_enc.shape[-2]
    best = W_enc.new_empty(rows, 0, dtype=torch.int64)
    scores = W_enc.new_empty(rows, 0)
    for tile in chunks(len(E), E.shape[1] * group.size * E.element_size(), tile_bytes):
        decoders = group.gather(E[tile]).transpose(0, 1).flatten(1)  # [tile, D]
        found = [
            _best_of_tile(W_enc[..., part, :], decoders, importance(part, tile), C, backend)
            for part in chunks(rows, len(decoders) * E.element_size(), scratch_bytes)
        ]
        # Stably, and earlier tiles first: of equal scores, the lowest ids.
        scores = torch.cat([scores, torch.cat([score for _, score in found])], 1)
        best = torch.cat([best, torch.cat([ids for ids, _ in found]) + tile.start], 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, best = scores[:, :C].contiguous(), best.gather(1, order[:, :C])
    return best


def _best_of_tile(
    rows: Tensor, decoders: Tensor, importance: Tensor, C: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """The best ids of a tile, numbered from its start, and their scores."""
    ids = ops.select_connections(rows, decoders, importance, min(C, len(decoders)), backend=backend)
    heads = rows if rows.ndim == 3 else rows[None]
    V = torch.stack([ops.virtual_weights(head.contiguous(), decoders, ids, backend=backend) for head in heads])
    return ids, V.norm(dim=0) * importance.gather(1, ids)
