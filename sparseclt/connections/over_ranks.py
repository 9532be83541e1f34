"""Connections of a CLT that is spread over ranks: each rank chooses those of its own latents."""

from functools import partial

import torch
from torch import Tensor

from sparseclt.config import Importance
from sparseclt.connections.activity import RARE, Activity
from sparseclt.model.attention import head_rows
from sparseclt.model.cross_layer import Reader, effective_decoders
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops.rows import add_at_
from sparseclt.parallel.select_connections import select_connections


def select_of_rank(
    clt: Transcoders, activity: Activity, C: int, importance: Importance, backend: str | None
) -> list[Tensor | None]:
    """`select_top_connections` for this rank's latents: [F/n, C] per module."""
    chosen: list[Tensor | None] = [None] * len(clt.sites)
    decoders = [module.W_dec.detach() for module in clt]
    for reader, E in effective_decoders(clt.readers(), clt.sites, decoders):
        rows, U = clt.reading_rows(reader.index).detach().to(E.dtype), len(E)
        if reader.attention is not None:
            rows = torch.stack([head_rows(rows, reader.attention, h) for h in range(len(reader.attention.W_V))])
        first = clt.transcoder(reader.index).rows.start
        score = partial(_importance, activity, reader, importance, first, E.dtype)
        chosen[reader.index] = select_connections(rows, E, score, min(C, U), group=reader.group, backend=backend)
    return chosen


def _importance(
    activity: Activity, reader: Reader, importance: Importance, first: int, dtype: torch.dtype, rows: slice, ids: slice
) -> Tensor:
    """s [rows, ids] of upstream latents `ids` for latents `first` + `rows` of a reader."""
    if importance == "coactivation" and reader.attention is None:
        return coactivation(activity, reader.index, slice(first + rows.start, first + rows.stop), ids).to(dtype)
    s = activity.magnitude("rms" if importance == "rms" else "mean").flatten()[ids].to(dtype)
    return s.expand(rows.stop - rows.start, -1)


def coactivation(activity: Activity, module: int, rows: slice, ids: slice) -> Tensor:
    """`Activity.coactivation` [rows, ids] for some upstream latents `ids`, numbered over all modules side by side."""
    assert activity.recent is not None
    recent, F, width, n = activity.recent, activity.mean.shape[1], ids.stop - ids.start, rows.stop - rows.start
    own = recent.indices[module]
    here = (recent.values[module] > 0) & (own >= rows.start) & (own < rows.stop)
    token, slot = here.nonzero(as_tuple=True)
    row = own[token, slot].long() - rows.start
    sums = recent.values.new_zeros(n * width)
    for u in range(ids.start // F, -(-ids.stop // F)):
        place = recent.indices[u, token].long() + u * F - ids.start
        inside = (place >= 0) & (place < width)
        add_at_(sums, (row[:, None] * width + place)[inside], recent.values[u, token][inside])
    fired = torch.bincount(row, minlength=n)[:, None]
    means = activity.magnitude("mean").flatten()[ids]
    return torch.where(fired < RARE, means, sums.view(n, width).div_(fired.clamp_min(1)))
