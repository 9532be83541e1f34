"""Sparse latents through sparse virtual weights: what they add to pre-activations."""

from typing import Any

from torch import Tensor
from torch.nn import functional

from sparseclt.ops._torch_rows import (
    accumulation_dtype,
    chunks,
    dense,
    dense_columns,
    fill_empty,
    row_dots,
    transposed_gather_sum,
)
from sparseclt.ops.backend import choose
from sparseclt.ops.checks import check_device, check_ids, check_indices, check_scratch, check_shapes, check_tensors
from sparseclt.ops.connections import Connections, as_connections, csc
from sparseclt.ops.registration import Implementation, Operator


def virtual_matmul(
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor | Connections,
    *,
    upstream: int | None = None,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """The upstream latents' part of the pre-activations: [N, F].

    Equivalent to `dense(z) @ sparse(V, connections).T`, dense(z) [N, U] and sparse(V) [F, U]. Differentiable in
    `z_values` and `V`. In fp16 and bf16, sums are accumulated in fp32.

    `z_values` `z_indices` [N, S]: active latents of all upstream modules side by side, ids in 0..U-1 (int32 or int64,
    duplicates add up, -1 is an empty slot); `V` [F, C] virtual weights; `connections` [F, C] ids in 0..U-1 or -1,
    distinct within a row: a `Connections`, or a tensor together with `upstream`, U. `scratch_bytes` bounds the working
    memory in bytes (at least that of one token; None: what suits the backend). `backend` as in `topk_encode`.
    Raises ValueError (shapes, ids out of range: z_indices are checked on the CPU only, U missing, devices,
    backend), TypeError (dtypes), ImportError (backend not installed).
    """
    connections = check_upstream(z_values, z_indices, V, connections, upstream)
    backend = choose("virtual_matmul", backend, V)
    if backend == "reference":
        return virtual_matmul_reference(z_values, z_indices, V, connections)
    order, starts = csc(connections, OPERATOR, backend, z_values)
    scratch = check_scratch(scratch_bytes, "virtual_matmul", backend)
    added: Tensor = OPERATOR(
        z_values, z_indices, V, connections.indices, order, starts, connections.upstream, scratch, backend
    )
    return added


def check_upstream(
    z_values: Tensor, z_indices: Tensor, V: Tensor, connections: Tensor | Connections, upstream: int | None
) -> Connections:
    """Checks the sparse operands and returns the connections as an object."""
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
    return connections


def virtual_matmul_reference(z_values: Tensor, z_indices: Tensor, V: Tensor, connections: Connections) -> Tensor:
    U = connections.upstream
    check_ids("z_indices", z_indices, U, "upstream latents")
    return dense(z_values, z_indices, U) @ dense(V, connections.indices, U).T


def forward_torch(
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    upstream: int,
    scratch_bytes: int,
) -> Tensor:
    pre = V.new_zeros(len(z_values), len(V))
    add_upstream(pre, z_values, z_indices, V, connections, upstream, scratch_bytes)
    return pre


def add_upstream(
    pre: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    upstream: int,
    scratch_bytes: int,
) -> None:
    """Adds the upstream part to the pre-activations [N, F] in place, rounding once.

    Each latent gathers the columns of dense z^T that it is connected to, for one chunk of tokens after another.
    """
    if upstream == 0 or V.shape[1] == 0 or z_values.shape[1] == 0:
        return
    wide = accumulation_dtype(V.dtype)
    z_values = z_values.to(wide)
    weights, ids = fill_empty(V.to(wide), connections, upstream)
    for part in chunks(len(pre), _token_bytes(weights, upstream), scratch_bytes):
        z = dense_columns(z_values[part], z_indices[part], upstream)
        pre[part] += functional.embedding_bag(ids, z, per_sample_weights=weights, mode="sum").T


def _token_bytes(V: Tensor, upstream: int) -> int:
    return (upstream + len(V)) * V.element_size()


def backward_torch(
    grad: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    upstream: int,
    scratch_bytes: int,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z_values [N, S] and V [F, C] from that of the pre-activations [N, F]."""
    dtype, wide = V.dtype, accumulation_dtype(V.dtype)
    z_values, V = z_values.to(wide), V.to(wide)
    dz = z_values.new_zeros(z_values.shape) if needed[0] else None
    dV = V.new_zeros(V.shape) if needed[1] else None
    if upstream > 0:
        for part in chunks(len(grad), _token_bytes(V, upstream), scratch_bytes):
            grad_T = grad[part].to(wide).T.contiguous()
            if dV is not None:
                dV += row_dots(grad_T, connections, dense_columns(z_values[part], z_indices[part], upstream))
            if dz is not None:
                dense_dz = transposed_gather_sum(V, order, starts, grad_T).T
                dz[part] = gather_slots(dense_dz, z_indices[part])
    return dz if dz is None else dz.to(dtype), dV if dV is None else dV.to(dtype)


def gather_slots(rows: Tensor, indices: Tensor) -> Tensor:
    """[N, S]: the entries of `rows` [N, U] at `indices`, 0 at empty slots."""
    return rows.gather(1, indices.clamp_min(0).long()).masked_fill_(indices < 0, 0)


def fake(z_values: Tensor, z_indices: Tensor, V: Tensor, *_: Any) -> Tensor:
    return V.new_empty(len(z_values), len(V))


def _check_ids(z_values: Tensor, z_indices: Tensor, *rest: Any) -> None:
    check_ids("z_indices", z_indices, rest[-2], "upstream latents")


def _torch() -> Implementation:
    return Implementation(forward_torch, backward_torch)


def _numba() -> Implementation:
    from sparseclt.ops import _numba as numba

    return Implementation(numba.virtual_matmul, numba.virtual_matmul_backward, reads_order=True)


def _triton() -> Implementation:
    from csrc_triton.virtual_matmul import backward, forward

    return Implementation(forward, backward, reads_order=True)


OPERATOR = Operator(
    "virtual_matmul(Tensor z_values, Tensor z_indices, Tensor V, Tensor connections, Tensor? order, Tensor? starts,"
    " SymInt upstream, SymInt scratch_bytes, str backend) -> Tensor",
    {"torch": _torch, "numba": _numba, "triton": _triton},
    fake,
    check=_check_ids,
    backward="grad, z_values, z_indices, V, connections, order, starts, upstream, scratch_bytes, needed -> z_values, V",
)
