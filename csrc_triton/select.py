"""Exact top-k of every row of a scratch of scores, in three launches at most.

1. k groups of neighbours that each hold a score >= t prove that the k-th largest score is >= t. So the k groups with
   the largest maxima (ties: the lowest groups) hold the answer, and the other groups are never read.
2. The k largest of their k x GROUP scores, found by a binary search for the k-th largest key, bit by bit (32
   counts of numbers that sit in registers), and compacted in the order of their columns. Ties at the k-th key go to
   the lowest columns: those are met first.
3. Descending order: each of the k survivors counts those ahead of it.

Keys are integers that order as floats do (float_key): the result does not depend on any schedule, and NaN is the
largest. There is no sort, and nothing to autotune.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AheadOfTime, ahead_of_time_case
from .scores import LOWEST, float_key

MAX_BLOCK = 2048  # keys of a row held in registers at a time; longer rows are read again at each bit
MIN_TILE = 2048  # short rows share a program
LONG = 1024  # slots from which on torch.sort puts them in order: counting takes k x k comparisons
PLACE_TILE = 4096  # comparisons at a time when the survivors are put in order


@triton.jit
def _load_keys(
    source,
    parents,
    rows,
    start,
    n,
    columns,
    candidates,
    source_row,
    parents_row,
    GROUP: tl.constexpr,
    HAS_PARENTS: tl.constexpr,
    IS_KEY: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns and keys [ROWS, BLOCK] of candidates start.. of each row; keys past the end are LOWEST."""
    place = start + tl.arange(0, BLOCK)
    valid = (rows < n)[:, None] & (place < candidates)[None, :]
    offset = rows.to(tl.int64)[:, None]
    if HAS_PARENTS:
        parent = tl.load(parents + offset * parents_row + (place // GROUP)[None, :], mask=valid, other=0)
        column = parent * GROUP + (place % GROUP)[None, :]
        valid = valid & (column < columns)
    else:
        column = place[None, :] + tl.zeros_like(rows)[:, None]
    if IS_KEY:
        key = tl.load(source + offset * source_row + column, mask=valid, other=LOWEST)
    else:
        value = tl.load(source + offset * source_row + column, mask=valid, other=0.0)
        key = tl.where(valid, float_key(value, ABSOLUTE), LOWEST)
    return column, key


@triton.jit
def select_kernel(
    source,  # [n, columns] fp32 scores, or int32 keys
    parents,  # [n, k] int32 groups of GROUP columns to look into (HAS_PARENTS), ascending
    labels,  # [n, columns] int32 what to write instead of the column (HAS_LABELS)
    ids,  # [n, >= k] int32 out: columns of the k largest, ascending
    values,  # [n, >= k] fp32 out: their scores (not IS_KEY)
    n,
    columns,
    candidates,
    k,
    first_id,
    source_row,
    parents_row,
    labels_row,
    out_row,
    GROUP: tl.constexpr,
    HAS_PARENTS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    IS_KEY: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column, key = _load_keys(
        source, parents, rows, 0, n, columns, candidates, source_row, parents_row,
        GROUP, HAS_PARENTS, IS_KEY, ABSOLUTE, BLOCK,
    )  # fmt: skip

    # The largest key that k candidates reach, from the highest bit down. XOR sets a bit, the sign bit included.
    bound = tl.full((ROWS,), LOWEST, tl.int32)
    bit = tl.full((ROWS,), LOWEST, tl.int32)
    for _ in range(32):
        trial = bound ^ bit
        reached = tl.sum((key >= trial[:, None]).to(tl.int32), axis=1)
        if not ONE_BLOCK:
            for start in range(BLOCK, candidates, BLOCK):
                more_column, more = _load_keys(
                    source, parents, rows, start, n, columns, candidates, source_row, parents_row,
                    GROUP, HAS_PARENTS, IS_KEY, ABSOLUTE, BLOCK,
                )  # fmt: skip
                reached += tl.sum((more >= trial[:, None]).to(tl.int32), axis=1)
        bound = tl.where(reached >= k, trial, bound)
        bit = (bit >> 1) & 0x7FFFFFFF

    above = tl.sum((key > bound[:, None]).to(tl.int32), axis=1)
    if not ONE_BLOCK:
        for start in range(BLOCK, candidates, BLOCK):
            more_column, more = _load_keys(
                source, parents, rows, start, n, columns, candidates, source_row, parents_row,
                GROUP, HAS_PARENTS, IS_KEY, ABSOLUTE, BLOCK,
            )  # fmt: skip
            above += tl.sum((more > bound[:, None]).to(tl.int32), axis=1)

    wanted = k - above  # of those equal to the bound, the first
    equal_before = tl.zeros((ROWS,), tl.int32)
    taken_before = tl.zeros((ROWS,), tl.int32)
    offset = rows.to(tl.int64)[:, None]
    for start in range(0, candidates, BLOCK):
        if not ONE_BLOCK:
            column, key = _load_keys(
                source, parents, rows, start, n, columns, candidates, source_row, parents_row,
                GROUP, HAS_PARENTS, IS_KEY, ABSOLUTE, BLOCK,
            )  # fmt: skip
        equal = (key == bound[:, None]).to(tl.int32)
        equal_rank = tl.cumsum(equal, axis=1) - equal + equal_before[:, None]
        take = (key > bound[:, None]) | ((equal > 0) & (equal_rank < wanted[:, None]))
        take = take & (rows < n)[:, None]
        took = take.to(tl.int32)
        place = tl.cumsum(took, axis=1) - took + taken_before[:, None]
        label = column + first_id
        if HAS_LABELS:
            label = tl.load(labels + offset * labels_row + column, mask=take, other=0)
        tl.store(ids + offset * out_row + place, label, mask=take)
        if not IS_KEY:
            value = tl.load(source + offset * source_row + column, mask=take, other=0.0)
            tl.store(values + offset * out_row + place, value, mask=take)
        equal_before += tl.sum(equal, axis=1)
        taken_before += tl.sum(took, axis=1)


@triton.jit
def place_kernel(
    values,  # [n, k] fp32
    ids,  # [n, k] int32, ascending; -1 for an empty slot, which goes last
    out_values,  # [n, k] out, any floating dtype (HAS_VALUES)
    out_ids,  # [n, k] int64 out
    n,
    k,
    in_row,
    out_values_row,
    out_ids_row,
    HAS_VALUES: tl.constexpr,
    RELU: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Descending order by rank: how many slots of the row are larger, or equal and before."""
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


@dataclass(frozen=True)
class SelectConfig:
    """Rows of a program and candidates it holds at a time."""

    rows: int
    block: int
    one_block: bool
    warps: int


def select_config(candidates: int) -> SelectConfig:
    block = min(max(16, triton.next_power_of_2(candidates)), MAX_BLOCK)
    rows = max(1, MIN_TILE // block)
    return SelectConfig(rows, block, candidates <= block, 16 if block == MAX_BLOCK else 8)  # 8 keys a thread


@dataclass(frozen=True)
class PlaceConfig:
    """Rows of a program and survivors that are compared at a time, with as many others."""

    rows: int
    block: int
    warps: int = 8


def place_config(k: int) -> PlaceConfig:
    block = min(max(8, triton.next_power_of_2(k)), 64)
    return PlaceConfig(PLACE_TILE // block**2, block)


def group_size(columns: int, k: int) -> int:
    """Columns of a group such that groups and scores to read, columns / G + k x G, are few; 1: no groups."""
    if columns < 16 * k:
        return 1  # more than half of the scores would be read a second time
    size = triton.next_power_of_2(int((columns / k) ** 0.5))
    return min(size, 64)


def select(
    scores: Tensor,
    maxima: Tensor | None,
    group: int,
    k: int,
    winners: Tensor,
    ids: Tensor,
    values: Tensor,
    *,
    absolute: bool = False,
    first_id: int = 0,
    labels: Tensor | None = None,
) -> None:
    """The k largest scores of each row, in the order of their columns, into `ids` and `values` [n, k].

    `scores` [n, columns] fp32; `maxima` [n, ceil(columns / group)] int32 keys of the groups' maxima, or None;
    `winners` [n, k] int32 is scratch for the winning groups; `labels` [n, columns] int32: ids of the columns.
    """
    n, columns = scores.shape
    ids_row = labels.stride(0) if labels is not None else 0
    if maxima is not None:
        groups = maxima.shape[1]
        config = select_config(groups)
        select_kernel[(triton.cdiv(n, config.rows),)](
            maxima, maxima, maxima, winners, scores, n, groups, groups, k, 0,
            maxima.stride(0), 0, 0, winners.stride(0),
            GROUP=1, HAS_PARENTS=False, HAS_LABELS=False, IS_KEY=True, ABSOLUTE=False,
            ROWS=config.rows, BLOCK=config.block, ONE_BLOCK=config.one_block, num_warps=config.warps, num_stages=1,
        )  # fmt: skip
    candidates = columns if maxima is None else k * group
    config = select_config(candidates)
    select_kernel[(triton.cdiv(n, config.rows),)](
        scores, winners, ids if labels is None else labels, ids, values, n, columns, candidates, k, first_id,
        scores.stride(0), winners.stride(0), ids_row, ids.stride(0),
        GROUP=group, HAS_PARENTS=maxima is not None, HAS_LABELS=labels is not None, IS_KEY=False, ABSOLUTE=absolute,
        ROWS=config.rows, BLOCK=config.block, ONE_BLOCK=config.one_block, num_warps=config.warps, num_stages=1,
    )  # fmt: skip


def place(
    values: Tensor, ids: Tensor, out_values: Tensor | None, out_ids: Tensor, *, relu: bool, absolute: bool = False
) -> None:
    """Slots [n, k] in descending order (of magnitude, if `absolute`); negative values stored as 0 if `relu`."""
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
    place_kernel[(triton.cdiv(n, config.rows), triton.cdiv(k, config.block))](
        values, ids, target, out_ids, n, k, ids.stride(0), target.stride(0), out_ids.stride(0),
        HAS_VALUES=out_values is not None, RELU=relu, ABSOLUTE=absolute,
        ROWS=config.rows, BLOCK=config.block, num_warps=config.warps, num_stages=1,
    )  # fmt: skip


def ahead_of_time() -> list[AheadOfTime]:
    """The configurations of select and place for short and long rows."""
    kernels = []
    for candidates in (128, 512, MAX_BLOCK // 2, MAX_BLOCK, 4 * MAX_BLOCK):
        config = select_config(candidates)
        for stage in ("groups", "scores", "pieces"):
            flags = {
                "GROUP": 16 if stage == "scores" else 1,
                "HAS_PARENTS": stage == "scores",
                "HAS_LABELS": stage == "pieces",
                "IS_KEY": stage == "groups",
                "ABSOLUTE": False,
                "ROWS": config.rows,
                "BLOCK": config.block,
                "ONE_BLOCK": config.one_block,
            }
            source = "*i32:16" if stage == "groups" else "*fp32:16"
            pointers = {"source": source, "parents": "*i32:16", "labels": "*i32:16"}
            pointers |= {"ids": "*i32:16", "values": "*fp32:16"}
            name = f"select {stage} {candidates}"
            options = {"num_warps": config.warps, "num_stages": 1}
            kernels.append(ahead_of_time_case(name, select_kernel, pointers, flags, options))
    for k in (8, 32, 128):
        config = place_config(k)
        flags = {"HAS_VALUES": True, "RELU": True, "ABSOLUTE": False, "ROWS": config.rows, "BLOCK": config.block}
        pointers = {"values": "*fp32:16", "ids": "*i32:16", "out_values": "*bf16:16", "out_ids": "*i64:16"}
        options = {"num_warps": config.warps, "num_stages": 1}
        kernels.append(ahead_of_time_case(f"place {k}", place_kernel, pointers, flags, options))
    return kernels
