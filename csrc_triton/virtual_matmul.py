"""Sparse latents through sparse virtual weights: the upstream part of pre-activations.

forward:  pre[n, i] = sum_c V[i, c] z[n, connections[i, c]], over the pairs of an active upstream latent and a
          connection that reads it (add_upstream.py)
backward: dz[n, s] = sum over that list of V x grad[n, i], and dV[i, c] = sum of z x grad[n, i] over the tokens
          in which the upstream latent of (i, c) is active
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_upstream import OutLists, list_bounds, out_lists, upstream_part
from .launch import PARTS_BYTES, LaunchConfig, cdiv, check_range, launcher
from .transpose import transpose

PART = 4096  # tokens of one connection that one program sums


@dataclass(frozen=True)
class Walk(LaunchConfig):
    """Walks `lists` lists side by side, `block` entries of each at a time."""

    lists: int = 8
    block: int = 32

    @property
    def constexprs(self) -> dict[str, int]:
        return {"LISTS": self.lists, "BLOCK": self.block}


D_VALUES = Walk(num_warps=2, lists=8, block=32)
D_WEIGHTS = Walk(num_warps=4, lists=64, block=8)


@launcher
def forward(
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    upstream: int,
    scratch_bytes: int,
) -> Tensor:
    """[N, F] from `z_values` and `z_indices` [N, S], `V` and `connections` [F, C] and U, the number of `upstream`
    latents; `order` and `starts`: `transpose(connections, U)`.

    Equivalent to `dense(z) @ sparse(V, connections).T`. No row of connections may name an upstream latent twice.
    `scratch_bytes` bounds the float32 sums of halves (at least one token's).
    """
    pre = V.new_empty(len(z_values), len(V))
    upstream_part(pre, z_values, z_indices, out_lists(V, order, starts), upstream, scratch_bytes)
    return pre


@triton.jit
def d_values_kernel(
    dz,  # [N, S]
    grad,  # [N, F]
    z_indices,  # [N, S] int32 or int64
    weights,  # [F*C]
    targets,  # [F*C]
    starts,  # [U+1]
    total,  # F*C
    U, S,
    dz_n, dz_s, grad_n, grad_f, index_n, index_s,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """LISTS slots of one token, each along its latent's list."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    id = tl.load(z_indices + n * index_n + s * index_s, mask=s < S, other=-1).to(tl.int64)
    low, high = list_bounds(starts, id, id >= 0, total, U)
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
    U, S, C,
    part,  # entries of a list per part; the last part takes the rest
    grad_n, grad_f, value_n, value_s, connection_f, connection_c,
    LISTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """LISTS connections, each along the tokens of its upstream latent; in CSC order neighbours share those tokens."""
    slot = tl.program_id(0).to(tl.int64) * LISTS + tl.arange(0, LISTS)
    p = tl.program_id(1)
    position = tl.load(order + slot, mask=slot < total, other=0).to(tl.int64)
    i = position // C
    id = tl.load(connections + i * connection_f + (position % C) * connection_c, mask=slot < total, other=-1).to(
        tl.int64
    )
    low, high = list_bounds(z_starts, id, id >= 0, z_total, U)
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
    upstream: int,
    scratch_bytes: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dz [N, S] and dV [F, C] from `grad` [N, F], 0 in empty slots; None where not `needed`.

    Other arguments as in `forward`.
    """
    check_range("z_indices", z_indices, upstream)
    nothing = 0 in (grad.numel(), z_values.numel(), V.numel(), upstream)
    dz = dV = None
    if needed[0]:
        dz = (
            torch.zeros_like(z_values) if nothing else _d_values(grad, z_indices, out_lists(V, order, starts), upstream)
        )
    if needed[1]:
        sums = z_values, z_indices, connections, order, upstream
        dV = torch.zeros_like(V) if nothing else _d_weights(grad, *sums)
    return dz, dV


def _d_values(grad: Tensor, z_indices: Tensor, lists: OutLists, upstream: int) -> Tensor:
    N, S = z_indices.shape
    dz = grad.new_empty(N, S)
    d_values_kernel[N, cdiv(S, D_VALUES.lists)](
        dz, grad, z_indices, *lists, len(lists.weights), upstream, S,
        *dz.stride(), *grad.stride(), *z_indices.stride(),
        **D_VALUES.constexprs, **D_VALUES.options,
    )  # fmt: skip
    return dz


def _d_weights(
    grad: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    connections: Tensor,
    order: Tensor,
    upstream: int,
) -> Tensor:
    """With many tokens in parts, which are added in order: a hot latent's list is as long as the batch."""
    (N, S), (F, C) = z_values.shape, connections.shape
    z_order, z_starts = transpose(z_indices, upstream)
    parts = max(1, min(cdiv(N, PART), PARTS_BYTES // (4 * F * C)))
    sums = grad.new_empty(parts, F * C, dtype=grad.dtype if parts == 1 else torch.float32)
    d_weights_kernel[cdiv(F * C, D_WEIGHTS.lists), parts](
        sums, grad, z_values, z_order, z_starts, connections, order,
        F * C, N * S, upstream, S, C, cdiv(N, parts),
        *grad.stride(), *z_values.stride(), *connections.stride(),
        **D_WEIGHTS.constexprs, **D_WEIGHTS.options,
    )  # fmt: skip
    return (sums[0] if parts == 1 else sums.sum(0).to(grad.dtype)).view(F, C)
