"""Slots in the order of the rows that they name: what every gradient of rows walks through."""

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import check_range, launcher


class Transpose(NamedTuple):
    """Slots of `indices` [N, K] in the order of the rows that they name (CSC), empty slots first.

    `order` [N*K]: positions in the flattened indices; `starts` [R+1]: where the empty slots, then each row's slots,
    begin.
    """

    order: Tensor
    starts: Tensor


@launcher
def transpose(indices: Tensor, rows: int) -> Transpose:
    """The stable order of `indices` by row: the same indices give the same order on every run.

    torch sorts by radix here, stably and without a trip to the host; a Triton kernel would only do it slower.
    """
    check_range("indices", indices, rows)
    fits = max(indices.numel(), rows) < torch.iinfo(torch.int32).max
    dtype = torch.int32 if fits else torch.int64
    keys, order = torch.sort(indices.reshape(-1).to(dtype) + 1, stable=True)
    starts = torch.searchsorted(keys, torch.arange(rows + 1, dtype=dtype, device=keys.device))
    return Transpose(order.to(dtype), starts.to(dtype))
