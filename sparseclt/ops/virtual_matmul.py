"""Sparse latents through sparse virtual weights: what they add to pre-activations."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparseclt.ops._rows import (
    SCRATCH_BYTES,
    chunks,
    dense,
    dense_columns,
    fill_empty,
    row_dots,
    transposed_gather_sum,
)
from sparseclt.ops.backend import implements, lookup
from sparseclt.ops.checks import check_device, check_indices, check_range, check_shapes, check_tensors
from sparseclt.ops.connections import Connections, as_connections


def virtual_matmul(
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor | Connections,
    *,
    upstream: int | None = None,
    backend: str | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Tensor:
    """The upstream latents' part of the pre-activations: [N, F].

    Equivalent to `dense(z) @ sparse(V, connections).T`, dense(z) [N, U] and sparse(V) [F, U].

    `z_values` `z_indices` [N, S]: active latents of all upstream modules side by side, ids in 0..U-1 (int32
    or int64, duplicates add up, -1 is an empty slot); `V` [F, C] virtual weights; `connections` [F, C] ids
    in 0..U-1 or -1, a `Connections` or a tensor (then give `upstream`, U). `scratch_bytes` bounds the working
    memory (one token's at least).
    Raises ValueError (shapes, ids out of range: z_indices are read on the CPU only, U missing, devices,
    backend), TypeError (dtypes).
    """
    connections = check_upstream(z_values, z_indices, V, connections, upstream)
    return lookup("virtual_matmul", backend)(z_values, z_indices, V, connections, scratch_bytes)


def check_upstream(
    z_values: Tensor, z_indices: Tensor, V: Tensor, connections: Tensor | Connections, upstream: int | None
) -> Connections:
    """Checks the sparse operands; the connections as an object."""
    check_tensors(z_values=z_values, V=V)
    check_indices("z_indices", z_indices)
    connections = as_connections(connections, upstream)
    check_shapes(
        z_values=(z_values, "N S"),
        z_indices=(z_indices, "N S"),
        V=(V, "F C"),
        connections=(connections.indices, "F C"),
    )
    check_device("z_indices", z_indices, "z_values", z_values)
    check_device("connections", connections.indices, "z_values", z_values)
    if z_indices.device.type == "cpu":
        check_range("z_indices", z_indices, connections.upstream, "upstream latents")
    return connections


@implements("virtual_matmul", "reference")
def virtual_matmul_reference(
    z_values: Tensor, z_indices: Tensor, V: Tensor, connections: Connections, scratch_bytes: int = 0
) -> Tensor:
    U = connections.upstream
    return dense(z_values, z_indices, U) @ dense(V, connections.indices, U).T


@implements("virtual_matmul", "torch")
def virtual_matmul_torch(
    z_values: Tensor, z_indices: Tensor, V: Tensor, connections: Connections, scratch_bytes: int
) -> Tensor:
    return _VirtualMatmul.apply(z_values, z_indices, V, connections, scratch_bytes)


def add_upstream(
    pre: Tensor, z_values: Tensor, z_indices: Tensor, V: Tensor, connections: Connections, scratch_bytes: int
) -> None:
    """Adds the upstream part to `pre` [N, F] in place.

    Each latent gathers the columns of dense z^T that it is connected to, a chunk of tokens at a time.
    """
    if connections.upstream == 0 or connections.C == 0 or z_values.shape[1] == 0:
        return
    weights, ids = fill_empty(V, connections.indices, connections.upstream)
    for part in chunks(len(pre), _token_bytes(V, connections), scratch_bytes):
        z = dense_columns(z_values[part], z_indices[part], connections.upstream)
        pre[part] += functional.embedding_bag(ids, z, per_sample_weights=weights, mode="sum").T


def _token_bytes(V: Tensor, connections: Connections) -> int:
    return (connections.upstream + len(V)) * V.element_size()


class _VirtualMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z_values: Tensor, z_indices: Tensor, V: Tensor, connections: Connections, scratch_bytes: int
    ) -> Tensor:
        pre = V.new_zeros(len(z_values), len(V))
        add_upstream(pre, z_values, z_indices, V, connections, scratch_bytes)
        ctx.save_for_backward(z_values, z_indices, V)
        ctx.connections, ctx.scratch_bytes = connections, scratch_bytes
        return pre

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z_values, z_indices, V = ctx.saved_tensors
        connections, U = ctx.connections, ctx.connections.upstream
        dz = torch.zeros_like(z_values) if ctx.needs_input_grad[0] else None
        dV = torch.zeros_like(V) if ctx.needs_input_grad[2] else None
        if U > 0:
            for part in chunks(len(grad), _token_bytes(V, connections), ctx.scratch_bytes):
                grad_T = grad[part].T.contiguous()
                if dV is not None:
                    z = dense_columns(z_values[part], z_indices[part], U)
                    dV += row_dots(grad_T, connections.indices, z)
                if dz is not None:
                    dense_dz = transposed_gather_sum(V, connections.transposed, grad_T).T
                    dz[part] = gather_slots(dense_dz, z_indices[part])
        return dz, None, dV, None, None


def gather_slots(rows: Tensor, indices: Tensor) -> Tensor:
    """[N, S]: the entries of `rows` [N, U] at `indices`, 0 at empty slots."""
    return rows.gather(1, indices.clamp_min(0).long()).masked_fill_(indices < 0, 0)
