"""Connections of a CLT that is spread over ranks: each rank chooses those of its own latents."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from sparseclt.config import Importance
from sparseclt.connections.activity import Activity
from sparseclt.model.cross_layer import Reader, effective_decoders
from sparseclt.model.transcoders import Transcoders
from sparseclt.parallel.select_connections import best_of_shares, most_important


def most_important_of_rank(
    clt: Transcoders, activity: Activity, C: int, importance: Importance, backend: str | None
) -> Iterator[tuple[Reader, Tensor, Tensor]]:
    """Every reader, the C upstream latents that matter most to each of this rank's latents, and how much they do:
    [F/n, C] each, or fewer where it has fewer upstream latents."""
    decoders = [module.W_dec.detach() for module in clt]
    for reader, E in effective_decoders(clt.readers(), clt.sites, decoders):
        rows, U = reader.carried(clt.reading_rows(reader.index).detach().to(E.dtype)), len(E)
        score = partial(_importance, activity, reader, importance, E.dtype)
        best = partial(most_important, importance=score, C=min(C, U), backend=backend)
        yield reader, *best_of_shares(rows, E, best, min(C, U), group=reader.group)


def _importance(
    activity: Activity, reader: Reader, importance: Importance, dtype: torch.dtype, rows: slice, ids: slice
) -> Tensor:
    """s [rows, ids] of upstream latents `ids` for latents `rows` of a reader."""
    if importance == "coactivation":
        return activity.coactivation_with(reader.index, rows, ids).to(dtype)
    return activity.magnitude(importance).flatten()[ids].to(dtype).expand(rows.stop - rows.start, -1)
