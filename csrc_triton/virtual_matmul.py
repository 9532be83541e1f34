"""Sparse latents through sparse virtual weights: what they add to pre-activations.

forward:  pre[n, i] += sum_c V[i, c] z[n, connections[i, c]], in the order of upstream latents (CSC): each active
          upstream latent of a token walks the list of connections that read it
backward: dz[n, s] = sum over that list of V x grad[n, i], and dV[i, c] = sum of z x grad[n, i] over the tokens
          that have the upstream latent of (i, c) active
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import AheadOfTime, LaunchConfig, ahead_of_time_case, cdiv, check_range, launcher
from .transpose import transpose

SCRATCH_BYTES = 64 << 20  # bound on the float32 sums that halves and parts need
PART = 4096  # tokens of one connection that one program adds up


@dataclass(frozen=True)
class Walk(LaunchConfig):
    """`lists` lists side by side, `block` entries of each at a time; `row` entries when a row is read or written."""

    lists: int = 1
    block: int = 64
    row: int = 1024


FORWARD = Walk(num_warps=1, lists=1, block=64)  # one warp: steps depend on each other, tokens do not
D_VALUES = Walk(num_warps=2, lists=8, block=32)
D_WEIGHTS = Walk(num_warps=4, lists=64, block=8)


class OutLists(NamedTuple):
    """Connections by upstream latent: `weights` and `targets` (downstream latents) [F*C], `starts` [U+1].

    Worth keeping where several chunks of tokens go through the same V.
    """

    weights: Tensor
    targets: Tensor
    starts: Tensor


def out_lists(V: Tensor, order: Tensor, starts: Tensor) -> OutLists:
    """V [F, C] in CSC order once, so that every token reads its lists contiguously."""
    C = max(V.shape[1], 1)
    return OutLists(V.reshape(-1).index_select(0, order), torch.div(order, C, rounding_mode="floor"), starts)


@triton.jit
def _list(starts, id, used, total, count):
    """Where the list of `id` (0..count-1) begins and ends; nowhere if not `used`."""
    low = tl.load(starts + id + 1, mask=used, other=0).to(tl.int64)
    high = tl.load(starts + id + 2, mask=used & (id + 1 < count), other=0).to(tl.int64)
    return low, tl.where(used & (id + 1 == count), total, high)


@triton.jit
def _slot(z_values, z_indices, starts, total, U, used, value_at, index_at):
    """A slot's value and its latent's list."""
    id = tl.load(z_indices + index_at, mask=used, other=-1).to(tl.int64)
    value = tl.load(z_values + value_at, mask=id >= 0, other=0).to(tl.float32)
    low, high = _list(starts, id, id >= 0, total, U)
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
    U,
    F,
    S,
    pre_n,
    pre_f,
    out_n,
    out_f,
    value_n,
    value_s,
    index_n,
    index_s,
    START: tl.constexpr,  # what the sums start from: "kept" ones, "zero", or a "copy" of `out`
    CAST: tl.constexpr,  # whether the sums go to `out` in the end
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
):
    """One token: its row of `pre` is this program's own, so reading and writing it needs no atomics."""
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
        # The next slot's chain of loads does not wait for this slot's sums.
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
            # A list names a downstream latent once: its entries do not meet.
            tl.store(place, tl.load(place, mask=used, other=0) + z * weight, mask=used)
        tl.debug_barrier()  # other threads read what this one wrote
        z = next_z
        low = next_low
        high = next_high
    if CAST:
        for start in range(0, F, ROW):
            i = start + tl.arange(0, ROW).to(tl.int64)
            tl.store(out + i * out_f, tl.load(pre + i * pre_f, mask=i < F, other=0), mask=i < F)


@launcher
def forward(
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    order: Tensor,
    starts: Tensor,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """[N, F] from `z_values` `z_indices` [N, S] and V [F, C]; `order` and `starts`: `transpose(connections, U)`.

    Equivalent to `dense(z) @ sparse(V, connections).T`. No row of connections may name an upstream latent twice.
    """
    pre = V.new_empty(len(z_values), len(V))
    _add(pre, z_values, z_indices, out_lists(V, order, starts), "zero", scratch_bytes)
    return pre


@launcher
def add_upstream(
    pre: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    order: Tensor,
    starts: Tensor,
    *,
    lists: OutLists | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> None:
    """Adds the upstream part to `pre` [N, F] in place; `lists`: `out_lists(V, order, starts)`, if at hand."""
    _add(pre, z_values, z_indices, lists or out_lists(V, order, starts), "copy", scratch_bytes)


def _add(out: Tensor, z_values: Tensor, z_indices: Tensor, lists: OutLists, start: str, scratch_bytes: int) -> None:
    """float32 is summed in place, halves in a float32 scratch, a chunk of tokens at a time."""
    (N, F), S, U = out.shape, z_values.shape[1], len(lists.starts) - 1
    check_range("z_indices", z_indices, U)
    if N == 0 or F == 0:
        return
    wide = out.dtype == torch.float32
    size = N if wide else min(N, max(1, scratch_bytes // (4 * F)))
    scratch = None if wide else out.new_empty(size, F, dtype=torch.float32)
    if wide and start == "copy":
        start = "kept"
    for first in range(0, N, size):
        part = slice(first, first + size)
        rows = out[part]
        sums = rows if scratch is None else scratch[: len(rows)]
        values, indices = z_values[part], z_indices[part]
        add_upstream_kernel[len(rows),](
            sums,
            rows,
            values,
            indices,
            *lists,
            len(lists.weights),
            U,
            F,
            S if len(lists.weights) else 0,
            *sums.stride(),
            *rows.stride(),
            *values.stride(),
            *indices.stride(),
            START=start,
            CAST=not wide,
            BLOCK=FORWARD.block,
            ROW=FORWARD.row,
            **FORWARD.options,
        )


@triton.jit
def d_values_kernel(
    dz,  # [N, S]
    grad,  # [N, F]
    z_indices,  # [N, S] int32 or int64
    weights,  # [F*C]
    targets,  # [F*C]
    starts,  # [U+1]
    total,
    U,
    S,
    dz_n,
    dz_s,
    grad_n,
    grad_f,
    index_n,
    index_s,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some slots of one token, each along its latent's list."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    id = tl.load(z_indices + n * index_n + s * index_s, mask=s < S, other=-1).to(tl.int64)
    low, high = _list(starts, id, id >= 0, total, U)
    sums = tl.zeros([LISTS, BLOCK], tl.float32)
    for start in range(0, tl.max(high - low, 0), BLOCK):
        entry = (low + start)[:, None] + tl.arange(0, BLOCK)[None, :]
        used = entry < high[:, None]
        i = tl.load(targets + entry, mask=used, other=0).to(tl.int64)
        weight = tl.load(weights + entry, mask=used, other=0).to(tl.float32)
        sums += weight * tl.load(grad + n * grad_n + i * grad_f, mask=used, other=0).to(tl.float32)
    tl.store(dz + n * dz_n + s * dz_s, tl.sum(sums, 1), mask=s < S)


@triton.jit
def d_weights_kernel(
    dV,  # [P, F*C], P parts
    grad,  # [N, F]
    z_values,  # [N, S]
    z_order,  # [N*S]
    z_starts,  # [U+1]
    connections,  # [F, C]
    order,  # [F*C]
    total,  # F*C
    z_total,  # N*S
    U,
    S,
    C,
    part,  # entries of a list in each part; the last takes what is left
    grad_n,
    grad_f,
    value_n,
    value_s,
    connection_f,
    connection_c,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some connections in CSC order, so that neighbours share their upstream latent's tokens: each along them."""
    slot = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    p = tl.program_id(1)
    position = tl.load(order + slot, mask=slot < total, other=0).to(tl.int64)
    i = position // C
    id = tl.load(connections + i * connection_f + (position % C) * connection_c, mask=slot < total, other=-1).to(
        tl.int64
    )
    low, high = _list(z_starts, id, id >= 0, z_total, U)
    low += p * part
    high = tl.where(p + 1 < tl.num_programs(1), tl.minimum(high, low + part), high)
    sums = tl.zeros([BLOCK, LISTS], tl.float32)
    for start in range(0, tl.max(high - low, 0), BLOCK):
        entry = start + tl.arange(0, BLOCK)[:, None] + low[None, :]
        used = entry < high[None, :]
        z_at = tl.load(z_order + entry, mask=used, other=0)
        n = (z_at // S).to(tl.int64)
        z = tl.load(z_values + n * value_n + (z_at % S).to(tl.int64) * value_s, mask=used, other=0).to(tl.float32)
        sums += z * tl.load(grad + n * grad_n + (i * grad_f)[None, :], mask=used, other=0).to(tl.float32)
    tl.store(dV + p.to(tl.int64) * total + position, tl.sum(sums, 0), mask=slot < total)


@launcher
def backward(
    grad: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    needs: tuple[bool, bool] = (True, True),
    *,
    part: int = PART,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor | None, Tensor | None]:
    """dz [N, S] and dV [F, C], 0 at empty slots, those that `needs` asks for; arguments as in `forward`."""
    check_range("z_indices", z_indices, len(starts) - 1)
    nothing = 0 in (grad.numel(), z_values.numel(), V.numel(), len(starts) - 1)
    dz = dV = None
    if needs[0]:
        dz = torch.zeros_like(z_values) if nothing else _d_values(grad, z_indices, out_lists(V, order, starts))
    if needs[1]:
        sums = z_values, z_indices, connections, order, starts, part, scratch_bytes
        dV = torch.zeros_like(V) if nothing else _d_weights(grad, *sums)
    return dz, dV


def _d_values(grad: Tensor, z_indices: Tensor, lists: OutLists) -> Tensor:
    N, S = z_indices.shape
    dz = grad.new_empty(N, S)
    d_values_kernel[N, cdiv(S, D_VALUES.lists)](
        dz,
        grad,
        z_indices,
        *lists,
        len(lists.weights),
        len(lists.starts) - 1,
        S,
        *dz.stride(),
        *grad.stride(),
        *z_indices.stride(),
        LISTS=D_VALUES.lists,
        BLOCK=D_VALUES.block,
        **D_VALUES.options,
    )
    return dz


def _d_weights(
    grad: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    part: int,
    scratch_bytes: int,
) -> Tensor:
    """With many tokens, in parts (a hot latent's list is as long as the batch) that are added in their order."""
    (N, S), (F, C), U = z_values.shape, connections.shape, len(starts) - 1
    z_order, z_starts = transpose(z_indices, U)
    parts = max(1, min(cdiv(N, part), scratch_bytes // (4 * F * C)))
    sums = grad.new_empty(parts, F * C, dtype=grad.dtype if parts == 1 else torch.float32)
    d_weights_kernel[cdiv(F * C, D_WEIGHTS.lists), parts](
        sums,
        grad,
        z_values,
        z_order,
        z_starts,
        connections,
        order,
        F * C,
        N * S,
        U,
        S,
        C,
        cdiv(N, parts),
        *grad.stride(),
        *z_values.stride(),
        *connections.stride(),
        LISTS=D_WEIGHTS.lists,
        BLOCK=D_WEIGHTS.block,
        **D_WEIGHTS.options,
    )
    return (sums[0] if parts == 1 else sums.sum(0).to(grad.dtype)).view(F, C)


def ahead_of_time() -> list[AheadOfTime]:
    """Every kernel, for contiguous rows; sums of bfloat16 in a float32 scratch."""
    cases = []
    for dtype in ("fp32", "bf16"):
        data, wide, int32, int64, size = f"*{dtype}:16", "*fp32:16", "*i32:16", "*i64:16", "i32:16"
        unit = {"pre_f": 1, "out_f": 1, "value_s": 1, "index_s": 1}
        for start in ("kept", "zero") if dtype == "fp32" else ("copy", "zero"):
            cases.append(
                ahead_of_time_case(
                    f"add_upstream {dtype} {start}",
                    add_upstream_kernel,
                    [wide, data, data, int64, data, int32, int32] + [size] * 8,
                    unit | {"START": start, "CAST": dtype != "fp32", "BLOCK": FORWARD.block, "ROW": FORWARD.row},
                    FORWARD.options,
                )
            )
        cases.append(
            ahead_of_time_case(
                f"d_values {dtype}",
                d_values_kernel,
                [data, data, int64, data, int32, int32] + [size] * 6,
                {"dz_s": 1, "grad_f": 1, "index_s": 1, "LISTS": D_VALUES.lists, "BLOCK": D_VALUES.block},
                D_VALUES.options,
            )
        )
        cases.append(
            ahead_of_time_case(
                f"d_weights {dtype}",
                d_weights_kernel,
                [data, data, data, int32, int32, int64, int32] + [size] * 9,
                {"grad_f": 1, "value_s": 1, "connection_c": 1, "LISTS": D_WEIGHTS.lists, "BLOCK": D_WEIGHTS.block},
                D_WEIGHTS.options,
            )
        )
    return cases
