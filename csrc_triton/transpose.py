"""Slots sorted by the row that they name: the order in which gradients of rows are summed."""

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import check_range, launcher


class Transpose(NamedTuple):
    """The slots of `indices` [N, K] sorted by the row that they name (CSC), empty slots first.

    `order` [N*K]: positions in the flattened indices; `starts` [R+1]: where the list of each row begins. The empty
    slots come before as a list of their own, so row r's list begins at `starts[r + 1]`.
    """

    order: Tensor
    starts: Tensor


@launcher
def transpose(indices: Tensor, rows: int) -> Transpose:
    """Stable sort of `indices` by row: the same indices give the same order on every run.

    torch's radix sort is stable and does not wait for the device; a Triton kernel could only be slower.
    """
    check_range("indices", indices, rows)
    fits = max(indices.numel(), rows) < torch.iinfo(torch.int32).max
    dtype = torch.int32 if fits else torch.int64
    keys, order = torch.sort(indices.reshape(-1).to(dtype) + 1, stable=True)
    starts = torch.searchsorted(keys, torch.arange(rows + 1, dtype=dtype, device=keys.device))
    return Transpose(order.to(dtype), starts.to(dtype))
