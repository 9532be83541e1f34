"""Exact top-k of every row of a scratch of scores, in three launches at most.

1. If k groups of neighbours each hold a score >= t, the k-th largest score is >= t. So the k groups with the largest
   maxima (ties: the lowest groups) hold the answer, and the other groups are never read.
2. Of their k x GROUP scores, a binary search finds the k-th largest key bit by bit (32 counts of numbers held in
   registers), and the k largest are compacted in the order of their columns. Ties at the k-th key go to the lowest
   columns, which come first.
3. To put them in descending order, each of the k survivors counts those ahead of it (place.py).

Keys are integers that order as floats do (float_key), so the result does not depend on scheduling, and NaN is the
largest. There is no sort, and nothing to autotune.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, LaunchConfig, cdiv, pow2
from .scores import LOWEST, float_key

MAX_BLOCK = 2048  # keys of a row held in registers at a time; longer rows are read again for every bit
MIN_TILE = 2048  # keys per program: short rows share one
ONE_WARP = 2048  # keys that one warp counts without waiting for others; more would not fit into its registers
COMPACTED = 128  # keys that one warp compacts at a time; with more, Triton 3.9 spills


@dataclass(frozen=True)
class SelectConfig(LaunchConfig):
    """Rows per program, and how many candidates of each it holds at a time."""

    num_warps: int = 8
    num_stages: int = 1
    rows: int = 1
    block: int = MAX_BLOCK
    part: int = MAX_BLOCK  # how many of them are compacted at a time
    one_block: bool = False  # all candidates fit

    @property
    def constexprs(self) -> dict[str, int | bool]:
        return {"ROWS": self.rows, "BLOCK": self.block, "PART": self.part, "ONE_BLOCK": self.one_block}


def select_config(candidates: int) -> SelectConfig:
    block = pow2(candidates, 16, MAX_BLOCK)
    if candidates <= ONE_WARP and not INTERPRETED:  # the interpreter likes few programs
        return SelectConfig(1, rows=max(1, 128 // block), block=block, part=min(block, COMPACTED), one_block=True)
    warps = 16 if block == MAX_BLOCK else 8  # 8 keys per thread
    return SelectConfig(warps, rows=max(1, MIN_TILE // block), block=block, part=block, one_block=candidates <= block)


def group_size(columns: int, k: int) -> int:
    """Columns per group that keep the number of maxima and scores read, columns / G + k x G, small; 1: no groups."""
    if columns < 16 * k:
        return 1  # groups would have more than half of the scores read a second time
    size = triton.next_power_of_2(int((columns / k) ** 0.5))
    return min(size, 64)


@triton.jit
def _load_keys(
    source, parents, rows, start, n, columns, candidates,
    source_row, parents_row,
    GROUP: tl.constexpr,
    HAS_PARENTS: tl.constexpr,
    IS_KEY: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Columns and keys [ROWS, BLOCK] of each row's candidates from `start` on; keys past the end are LOWEST."""
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
def _compact(
    column, key, bound, wanted, equal_before, taken_before, source, labels, ids, values, rows, n, first_id,
    source_row, labels_row, out_row,
    HAS_LABELS: tl.constexpr,
    IS_KEY: tl.constexpr,
):  # fmt: skip
    """Writes the candidates above the bound, and the first `wanted` equal to it, behind those before them; how many
    were equal and taken up to here."""
    equal = (key == bound[:, None]).to(tl.int32)
    equal_rank = tl.cumsum(equal, axis=1) - equal + equal_before[:, None]
    take = (key > bound[:, None]) | ((equal > 0) & (equal_rank < wanted[:, None]))
    take = take & (rows < n)[:, None]
    took = take.to(tl.int32)
    place = tl.cumsum(took, axis=1) - took + taken_before[:, None]
    offset = rows.to(tl.int64)[:, None]
    label = column + first_id
    if HAS_LABELS:
        label = tl.load(labels + offset * labels_row + column, mask=take, other=0)
    tl.store(ids + offset * out_row + place, label, mask=take)
    if not IS_KEY:
        value = tl.load(source + offset * source_row + column, mask=take, other=0.0)
        tl.store(values + offset * out_row + place, value, mask=take)
    return equal_before + tl.sum(equal, axis=1), taken_before + tl.sum(took, axis=1)


@triton.jit
def select_kernel(
    source,  # [n, columns] fp32 scores, or int32 keys
    parents,  # [n, k] int32 groups of GROUP columns to look into (HAS_PARENTS), ascending
    labels,  # [n, columns] int32 ids to write instead of the columns (HAS_LABELS)
    ids,  # [n, >= k] int32 out: columns of the k largest, ascending
    values,  # [n, >= k] fp32 out: their scores (not IS_KEY)
    n, columns, candidates, k, first_id,
    source_row, parents_row, labels_row, out_row,
    GROUP: tl.constexpr,
    HAS_PARENTS: tl.constexpr,
    HAS_LABELS: tl.constexpr,
    IS_KEY: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The k largest of each row's candidates, in the order of their columns."""
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
    if ONE_BLOCK and PART == BLOCK:
        _compact(
            column, key, bound, wanted, equal_before, taken_before, source, labels, ids, values, rows, n, first_id,
            source_row, labels_row, out_row, HAS_LABELS, IS_KEY,
        )  # fmt: skip
    else:
        for start in range(0, candidates, PART):
            part_column, part_key = _load_keys(
                source, parents, rows, start, n, columns, candidates, source_row, parents_row,
                GROUP, HAS_PARENTS, IS_KEY, ABSOLUTE, PART,
            )  # fmt: skip
            equal_before, taken_before = _compact(
                part_column, part_key, bound, wanted, equal_before, taken_before, source, labels, ids, values, rows, n,
                first_id, source_row, labels_row, out_row, HAS_LABELS, IS_KEY,
            )  # fmt: skip


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
    """Writes the k largest scores of each row, in the order of their columns, to `ids` and `values` [n, k].

    `scores` [n, columns] fp32; `maxima` [n, ceil(columns / group)] int32 keys of the groups' maxima, or None;
    `winners` [n, k] int32: scratch for the winning groups; `labels` [n, columns] int32: the columns' ids, if those are
    not `first_id`, `first_id + 1`, ...
    """
    n, columns = scores.shape
    ids_row = labels.stride(0) if labels is not None else 0
    if maxima is not None:
        groups = maxima.shape[1]
        config = select_config(groups)
        select_kernel[(cdiv(n, config.rows),)](
            maxima, maxima, maxima, winners, scores, n, groups, groups, k, 0,
            maxima.stride(0), 0, 0, winners.stride(0),
            GROUP=1, HAS_PARENTS=False, HAS_LABELS=False, IS_KEY=True, ABSOLUTE=False,
            **config.constexprs, **config.options,
        )  # fmt: skip
    candidates = columns if maxima is None else k * group
    config = select_config(candidates)
    select_kernel[(cdiv(n, config.rows),)](
        scores, winners, ids if labels is None else labels, ids, values, n, columns, candidates, k, first_id,
        scores.stride(0), winners.stride(0), ids_row, ids.stride(0),
        GROUP=group, HAS_PARENTS=maxima is not None, HAS_LABELS=labels is not None, IS_KEY=False, ABSOLUTE=absolute,
        **config.constexprs, **config.options,
    )  # fmt: skip
