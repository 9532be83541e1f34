"""The k survivors of a selection in descending order: each counts those ahead of it."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, cdiv, pow2
from .scores import LOWEST, float_key

LONG = 1024  # above this k, torch.sort orders the survivors: counting takes k x k comparisons
PLACE_TILE = 4096  # comparisons at a time when the survivors are ordered


@dataclass(frozen=True)
class PlaceConfig(LaunchConfig):
    """Rows per program, and how many survivors are compared at a time with as many others."""

    num_warps: int = 8
    num_stages: int = 1
    rows: int = 1
    block: int = 64

    @property
    def constexprs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "BLOCK": self.block}


def place_config(k: int) -> PlaceConfig:
    block = pow2(k, 8, 64)
    return PlaceConfig(rows=PLACE_TILE // block**2, block=block)


@triton.jit
def place_kernel(
    values,  # [n, k] fp32
    ids,  # [n, k] int32, ascending; -1 for an empty slot, which goes last
    out_values,  # [n, k] out, any floating dtype (HAS_VALUES)
    out_ids,  # [n, k] int64 out
    n, k,
    in_row, out_values_row, out_ids_row,
    HAS_VALUES: tl.constexpr,
    RELU: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Descending order by rank: the number of slots in the row that are larger, or equal and earlier."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = rows.to(tl.int64)[:, None]
    valid = (rows < n)[:, None] & (slots < k)[None, :]
    label = tl.load(ids + offset * in_row + slots[None, :], mask=valid, other=-1)
    value = tl.load(values + offset * in_row + slots[None, :], mask=valid, other=0.0)
    key = tl.where(label >= 0, float_key(value, ABSOLUTE), LOWEST)
    rank = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, k, BLOCK):
        others = start + tl.arange(0, BLOCK)
        there = (rows < n)[:, None] & (others < k)[None, :]
        other_label = tl.load(ids + offset * in_row + others[None, :], mask=there, other=-1)
        other_value = tl.load(values + offset * in_row + others[None, :], mask=there, other=0.0)
        other_key = tl.where(other_label >= 0, float_key(other_value, ABSOLUTE), LOWEST)
        before = (others[None, :] < slots[:, None])[None, :, :]
        other = other_key[:, None, :]
        ahead = (other > key[:, :, None]) | ((other == key[:, :, None]) & before)
        rank += tl.sum((ahead & there[:, None, :]).to(tl.int32), axis=2)
    if HAS_VALUES:
        if RELU:
            value = tl.where((value > 0.0) | (value != value), value, 0.0)
        tl.store(out_values + offset * out_values_row + rank, value.to(out_values.dtype.element_ty), mask=valid)
    tl.store(out_ids + offset * out_ids_row + rank, label.to(tl.int64), mask=valid)


def place(
    values: Tensor, ids: Tensor, out_values: Tensor | None, out_ids: Tensor, *, relu: bool, absolute: bool = False
) -> None:
    """Puts slots [n, k] in descending order (of magnitude if `absolute`); stores negative values as 0 if `relu`."""
    n, k = ids.shape
    if n == 0 or k == 0:
        return
    if k > LONG:
        key = (values.abs() if absolute else values).masked_fill(ids < 0, -torch.inf)
        order = key.sort(dim=1, descending=True, stable=True).indices  # stable: ties keep the order of the ids
        out_ids.copy_(ids.gather(1, order))
        if out_values is not None:
            out_values.copy_((values.relu() if relu else values).gather(1, order))
        return
    config = place_config(k)
    target = values if out_values is None else out_values
    place_kernel[(cdiv(n, config.rows), cdiv(k, config.block))](
        values, ids, target, out_ids, n, k, ids.stride(0), target.stride(0), out_ids.stride(0),
        HAS_VALUES=out_values is not None, RELU=relu, ABSOLUTE=absolute,
        **config.constexprs, **config.options,
    )  # fmt: skip
