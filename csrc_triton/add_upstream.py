"""Adds the upstream part to pre-activations: pre[n, i] += sum_c V[i, c] z[n, connections[i, c]].

A token's work is a list of pairs: an active upstream latent, and a connection that reads it. Lists of latents are short
(two or three connections where latents and slots are spread evenly), so the pairs of all slots are laid end to end, and
a program takes a full block of them at a time. Pairs of one block that meet the same place are added up first, by
comparing all with all, and one of them writes: no atomics, and the order of every sum is fixed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, check_range, spans


@dataclass(frozen=True)
class Walk(LaunchConfig):
    """`block`: pairs, or slots, at a time."""

    block: int = 64

    @property
    def constexprs(self) -> dict[str, int]:
        return {"BLOCK": self.block}


SLOTS = Walk(num_warps=4, block=256)
PAIRS = Walk(num_warps=1, block=64)  # one warp: blocks of a token depend on each other, and nothing waits at a barrier


class OutLists(NamedTuple):
    """V by upstream latent: `weights` and `targets` (downstream latents) [F*C], `starts` [U+1] as in `Transpose`."""

    weights: Tensor
    targets: Tensor
    starts: Tensor


def out_lists(V: Tensor, order: Tensor, starts: Tensor) -> OutLists:
    """V [F, C] in CSC order."""
    C = max(V.shape[1], 1)
    return OutLists(V.reshape(-1).index_select(0, order), torch.div(order, C, rounding_mode="floor"), starts)


@triton.jit
def list_bounds(starts, id, used, total, count):
    """Where the list of `id` (0..count-1) begins and ends; an empty list if not `used`."""
    low = tl.load(starts + id + 1, mask=used, other=0).to(tl.int64)
    high = tl.load(starts + id + 2, mask=used & (id + 1 < count), other=0).to(tl.int64)
    return low, tl.where(used & (id + 1 == count), total, high)


class TokenPairs(NamedTuple):
    """The pairs of every token. `ends` [N, S]: how many pairs a token has up to and including each slot; `shifts`
    [N, S]: what to add to a pair's number to have its entry in `OutLists`."""

    ends: Tensor
    shifts: Tensor


@triton.jit
def token_pairs_kernel(
    ends,  # [N, S] int32 out
    shifts,  # [N, S] out, int32 or int64
    z_indices,  # [N, S] int32 or int64
    starts,  # [U+1]
    total,  # F*C
    U, S,
    index_n, index_s,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token."""
    n = tl.program_id(0).to(tl.int64)
    before = tl.zeros((), tl.int64)
    for first in range(0, S, BLOCK):
        s = first + tl.arange(0, BLOCK).to(tl.int64)
        id = tl.load(z_indices + n * index_n + s * index_s, mask=s < S, other=-1).to(tl.int64)
        low, high = list_bounds(starts, id, id >= 0, total, U)
        end = before + tl.cumsum(high - low, 0)
        tl.store(ends + n * S + s, end.to(tl.int32), mask=s < S)
        tl.store(shifts + n * S + s, (high - end).to(shifts.dtype.element_ty), mask=s < S)
        before += tl.sum(high - low, 0)


def token_pairs(z_indices: Tensor, lists: OutLists, upstream: int) -> TokenPairs:
    """Of the slots `z_indices` [N, S], S > 0."""
    N, S = z_indices.shape
    starts = lists.starts
    pairs = TokenPairs(starts.new_empty(N, S, dtype=torch.int32), starts.new_empty(N, S))
    token_pairs_kernel[(N,)](
        *pairs, z_indices, starts, len(lists.weights), upstream, S, *z_indices.stride(),
        **SLOTS.constexprs, **SLOTS.options,
    )  # fmt: skip
    return pairs


@triton.jit
def block_of_pairs(ends, shifts, first, count, S, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Slots and entries of a token's BLOCK pairs from number `first` on, and which exist. `ends`, `shifts` [S]."""
    pair = first + tl.arange(0, BLOCK)
    used = pair < count
    slot = tl.zeros((BLOCK,), tl.int32)
    last = slot + (S - 1)
    for _ in range(STEPS):  # binary search for the first slot that ends behind the pair
        middle = (slot + last) // 2
        behind = tl.load(ends + middle, mask=used & (slot < last), other=0) > pair
        slot = tl.where(behind, slot, tl.minimum(middle + 1, last))
        last = tl.where(behind, middle, last)
    entry = pair + tl.load(shifts + slot, mask=used, other=0).to(tl.int64)
    return slot, entry, used


def search_steps(S: int) -> int:
    """Steps of a binary search among S slots."""
    return (S - 1).bit_length()


@triton.jit
def added_up(place, value, used):
    """The sum of the values that go to the same place, and which one of them is to write it: the first."""
    order = tl.arange(0, place.shape[0])
    same = (place[:, None] == place[None, :]) & used[:, None]
    # Over axis 0, along which a thread holds many entries: few shuffles.
    sums = tl.sum(tl.where(same, value[:, None], 0.0), axis=0)
    first = tl.min(tl.where(same, order[:, None], place.shape[0]), axis=0)
    return sums, used & (first == order)


@triton.jit
def add_upstream_kernel(
    pre,  # [N, F] float32
    z_values,  # [N, S]
    ends,  # [N, S]
    shifts,  # [N, S]
    weights,  # [F*C]
    targets,  # [F*C]
    S,
    pre_n, pre_f, value_n, value_s,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token. No other program touches its row of `pre`."""
    n = tl.program_id(0).to(tl.int64)
    pre += n * pre_n
    z_values += n * value_n
    ends += n * S
    shifts += n * S
    count = tl.load(ends + S - 1)
    for first in range(0, count, BLOCK):
        slot, entry, used = block_of_pairs(ends, shifts, first, count, S, STEPS, BLOCK)
        i = tl.load(targets + entry, mask=used, other=-1).to(tl.int32)
        value = tl.load(weights + entry, mask=used, other=0).to(tl.float32)
        value *= tl.load(z_values + slot.to(tl.int64) * value_s, mask=used, other=0).to(tl.float32)
        sums, writes = added_up(i, value, used)
        place = pre + i.to(tl.int64) * pre_f
        tl.store(place, tl.load(place, mask=writes, other=0) + sums, mask=writes)
        tl.debug_barrier()  # the next block may read what another thread wrote


def add_upstream(out: Tensor, z_values: Tensor, z_indices: Tensor, lists: OutLists, upstream: int) -> None:
    """Adds the upstream part to `out` [N, F] float32."""
    (N, F), S = out.shape, z_values.shape[1]
    check_range("z_indices", z_indices, upstream)
    if 0 in (N, F, S, len(lists.weights)):
        return
    add_upstream_kernel[(N,)](
        out, z_values, *token_pairs(z_indices, lists, upstream), lists.weights, lists.targets, S,
        *out.stride(), *z_values.stride(), STEPS=search_steps(S), **PAIRS.constexprs, **PAIRS.options,
    )  # fmt: skip


def upstream_part(
    out: Tensor, z_values: Tensor, z_indices: Tensor, lists: OutLists, upstream: int, scratch_bytes: int
) -> None:
    """Writes the upstream part to `out` [N, F]; halves are summed in float32, a chunk of tokens at a time."""
    if out.dtype == torch.float32:
        add_upstream(out.zero_(), z_values, z_indices, lists, upstream)
        return
    N, F = out.shape
    size = max(1, min(N, scratch_bytes // max(1, 4 * F)))
    scratch = out.new_empty(size, F, dtype=torch.float32)
    for tokens in spans(N, size):
        sums = scratch[: tokens.stop - tokens.start].zero_()
        add_upstream(sums, z_values[tokens], z_indices[tokens], lists, upstream)
        out[tokens] = sums
