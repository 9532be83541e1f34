"""Adds the upstream part to pre-activations: the walk that virtual_matmul and connected_encode share.

pre[n, i] += sum_c V[i, c] z[n, connections[i, c]], in the order of upstream latents (CSC): each active upstream latent
of a token walks the list of connections that read it.
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
    """Walks a list by `block` entries; reads and writes rows by `row` entries."""

    block: int = 64
    row: int = 1024

    @property
    def constexprs(self) -> dict[str, int]:
        return {"BLOCK": self.block, "ROW": self.row}


WALK = Walk(num_warps=1)  # one warp: the steps of a token depend on each other


class OutLists(NamedTuple):
    """V by upstream latent: `weights` and `targets` (downstream latents) [F*C], `starts` [U+1] as in `Transpose`.

    One program per token reads the lists contiguously; several chunks of tokens can share them.
    """

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


@triton.jit
def _slot(z_values, z_indices, starts, total, U, used, value_at, index_at):
    """A slot's value, and where its latent's list begins and ends."""
    id = tl.load(z_indices + index_at, mask=used, other=-1).to(tl.int64)
    value = tl.load(z_values + value_at, mask=id >= 0, other=0).to(tl.float32)
    low, high = list_bounds(starts, id, id >= 0, total, U)
    return value, low, high


@triton.jit
def add_upstream_kernel(
    pre,  # [N, F] float32
    out,  # [N, F] float16 or bfloat16, unused where `pre` is the output itself
    z_values,  # [N, S]
    z_indices,  # [N, S] int32 or int64
    weights,  # [F*C]
    targets,  # [F*C]
    starts,  # [U+1]
    total,  # F*C
    U, F, S,
    pre_n, pre_f, out_n, out_f, value_n, value_s, index_n, index_s,
    START: tl.constexpr,  # the sums start from those in `pre` ("kept"), from "zero", or from a "copy" of `out`
    CAST: tl.constexpr,  # whether the sums are cast to `out` in the end
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """One token. No other program touches its row of `pre`, so adding to it needs no atomics."""
    n = tl.program_id(0).to(tl.int64)
    pre += n * pre_n
    out += n * out_n
    z_values += n * value_n
    z_indices += n * index_n
    if START != "kept":
        for start in range(0, F, ROW):
            i = start + tl.arange(0, ROW).to(tl.int64)
            begin = tl.zeros([ROW], tl.float32)
            if START == "copy":
                begin = tl.load(out + i * out_f, mask=i < F, other=0).to(tl.float32)
            tl.store(pre + i * pre_f, begin, mask=i < F)
        tl.debug_barrier()
    z, low, high = _slot(z_values, z_indices, starts, total, U, S > 0, 0, 0)
    after = n * 0
    for _ in range(S):
        # Loaded ahead, so that the next slot's chain of loads does not wait for this slot's sums.
        after += 1
        next_z, next_low, next_high = _slot(
            z_values, z_indices, starts, total, U, after < S, after * value_s, after * index_s
        )
        for first in range(low, high, BLOCK):
            entry = first + tl.arange(0, BLOCK)
            used = entry < high
            i = tl.load(targets + entry, mask=used, other=0).to(tl.int64)
            weight = tl.load(weights + entry, mask=used, other=0).to(tl.float32)
            place = pre + i * pre_f
            # A list names a downstream latent at most once, so no two of its entries meet.
            tl.store(place, tl.load(place, mask=used, other=0) + z * weight, mask=used)
        tl.debug_barrier()  # other threads read what this one wrote
        z = next_z
        low = next_low
        high = next_high
    if CAST:
        for start in range(0, F, ROW):
            i = start + tl.arange(0, ROW).to(tl.int64)
            tl.store(out + i * out_f, tl.load(pre + i * pre_f, mask=i < F, other=0), mask=i < F)


def add_upstream(
    out: Tensor, z_values: Tensor, z_indices: Tensor, lists: OutLists, upstream: int, start: str, scratch_bytes: int
) -> None:
    """Writes the upstream part to `out` [N, F], or adds it to the present contents if `start` is "copy", not "zero".

    float32 is summed in place; halves are summed in a float32 scratch, a chunk of tokens at a time.
    """
    (N, F), S = out.shape, z_values.shape[1]
    check_range("z_indices", z_indices, upstream)
    if N == 0 or F == 0:
        return
    wide = out.dtype == torch.float32
    size = N if wide else min(N, max(1, scratch_bytes // (4 * F)))
    scratch = None if wide else out.new_empty(size, F, dtype=torch.float32)
    if wide and start == "copy":
        start = "kept"
    total = len(lists.weights)
    for tokens in spans(N, size):
        rows, values, indices = out[tokens], z_values[tokens], z_indices[tokens]
        sums = rows if scratch is None else scratch[: len(rows)]
        add_upstream_kernel[len(rows),](
            sums, rows, values, indices, *lists, total, upstream, F, S if total else 0,
            *sums.stride(), *rows.stride(), *values.stride(), *indices.stride(),
            START=start, CAST=not wide, **WALK.constexprs, **WALK.options,
        )  # fmt: skip
