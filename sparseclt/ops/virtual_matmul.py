"""Sparse latents through sparse virtual weights: what they add to pre-activations."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from sparseclt.ops._registration import define, fake_gradients, if_needed, present
from sparseclt.ops._rows import (
    Transpose,
    accumulation_dtype,
    chunks,
    dense,
    dense_columns,
    fill_empty,
    row_dots,
    transposed_gather_sum,
)
from sparseclt.ops.backend import choose, implementation, register
from sparseclt.ops.checks import check_device, check_ids, check_indices, check_scratch, check_shapes, check_tensors
from sparseclt.ops.connections import Connections, as_connections, csc


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

    Equivalent to `dense(z) @ sparse(V, connections).T`, dense(z) [N, U] and sparse(V) [F, U].

    `z_values` `z_indices` [N, S]: active latents of all upstream modules side by side, ids in 0..U-1 (int32
    or int64, duplicates add up, -1 is an empty slot); `V` [F, C] virtual weights; `connections` [F, C] ids
    in 0..U-1 or -1, distinct in a row, a `Connections` or a tensor (then give `upstream`, U). `scratch_bytes`
    bounds the working memory (one token's at least; None: what suits the backend).
    Raises ValueError (shapes, ids out of range: z_indices are read on the CPU only, U missing, devices,
    backend), TypeError (dtypes), ImportError (backend not installed).
    """
    connections = check_upstream(z_values, z_indices, V, connections, upstream)
    backend = choose("virtual_matmul", backend, V)
    if backend == "reference":
        return virtual_matmul_reference(z_values, z_indices, V, connections)
    order, starts = csc(connections, "virtual_matmul", backend, z_values)
    scratch = check_scratch(scratch_bytes, backend)
    return _virtual_matmul(
        z_values, z_indices, V, connections.indices, order, starts, connections.upstream, scratch, backend
    )


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
    return connections


class Upstream(NamedTuple):
    """Upstream latents and what reads them, as backends take them."""

    z_values: Tensor  # [N, S]
    z_indices: Tensor  # [N, S], -1: empty
    V: Tensor  # [F, C] virtual weights
    connections: Tensor  # [F, C], -1: empty
    order: Tensor | None  # `csc`, of backends that are registered to ask for it
    starts: Tensor | None
    size: int  # U

    @property
    def csc(self) -> Transpose:
        """The connections in the order of upstream latents."""
        assert self.order is not None and self.starts is not None
        return Transpose(self.order, self.starts)


def virtual_matmul_reference(z_values: Tensor, z_indices: Tensor, V: Tensor, connections: Connections) -> Tensor:
    U = connections.upstream
    check_ids("z_indices", z_indices, U, "upstream latents")
    return dense(z_values, z_indices, U) @ dense(V, connections.indices, U).T


def forward_torch(upstream: Upstream, scratch_bytes: int) -> Tensor:
    pre = upstream.V.new_zeros(len(upstream.z_values), len(upstream.V))
    add_upstream(pre, upstream, slice(None), scratch_bytes)
    return pre


def add_upstream(pre: Tensor, upstream: Upstream, tokens: slice, scratch_bytes: int) -> None:
    """Adds the upstream part of some tokens to their `pre` [n, F] in place, rounding once.

    Each latent gathers the columns of dense z^T that it is connected to, a chunk of tokens at a time.
    """
    z_values, z_indices, V, connections, _, _, U = upstream
    if U == 0 or V.shape[1] == 0 or z_values.shape[1] == 0:
        return
    z_values, z_indices = z_values[tokens].to(accumulation_dtype(V.dtype)), z_indices[tokens]
    weights, ids = fill_empty(V.to(accumulation_dtype(V.dtype)), connections, U)
    for part in chunks(len(pre), _token_bytes(weights, U), scratch_bytes):
        z = dense_columns(z_values[part], z_indices[part], U)
        pre[part] += functional.embedding_bag(ids, z, per_sample_weights=weights, mode="sum").T


def _token_bytes(V: Tensor, U: int) -> int:
    return (U + len(V)) * V.element_size()


def backward_torch(
    grad: Tensor, upstream: Upstream, scratch_bytes: int, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of z_values [N, S] and V [F, C] from that of the pre-activations [N, F]."""
    z_values, z_indices, V, connections, _, _, U = upstream
    dtype, wide = V.dtype, accumulation_dtype(V.dtype)
    z_values, V = z_values.to(wide), V.to(wide)
    dz = z_values.new_zeros(z_values.shape) if needed[0] else None
    dV = V.new_zeros(V.shape) if needed[1] else None
    if U > 0:
        for part in chunks(len(grad), _token_bytes(V, U), scratch_bytes):
            grad_T = grad[part].to(wide).T.contiguous()
            if dV is not None:
                dV += row_dots(grad_T, connections, dense_columns(z_values[part], z_indices[part], U))
            if dz is not None:
                dense_dz = transposed_gather_sum(V, upstream.csc, grad_T).T
                dz[part] = gather_slots(dense_dz, z_indices[part])
    return dz if dz is None else dz.to(dtype), dV if dV is None else dV.to(dtype)


def gather_slots(rows: Tensor, indices: Tensor) -> Tensor:
    """[N, S]: the entries of `rows` [N, U] at `indices`, 0 at empty slots."""
    return rows.gather(1, indices.clamp_min(0).long()).masked_fill_(indices < 0, 0)


register("virtual_matmul", "reference", virtual_matmul_reference)
register("virtual_matmul", "torch", forward_torch, backward_torch)


def _run(*args: Any) -> Tensor:
    *arguments, scratch_bytes, backend = args
    upstream = Upstream(*arguments)
    check_ids("z_indices", upstream.z_indices, upstream.size, "upstream latents")
    return implementation("virtual_matmul", backend).forward(upstream, scratch_bytes)


def _fake(z_values: Tensor, z_indices: Tensor, V: Tensor, *rest: Any) -> Tensor:
    return V.new_empty(len(z_values), len(V))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.upstream, ctx.scratch_bytes, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    grads = _backward(grad, *ctx.saved_tensors, ctx.upstream, ctx.scratch_bytes, needed, ctx.backend)
    dz, dV = if_needed(needed, grads)
    return dz, None, dV, *[None] * 6


def _run_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *arguments, scratch_bytes, needed, backend = args
    run = implementation("virtual_matmul", backend).gradients
    return present(*run(grad, Upstream(*arguments), scratch_bytes, needed))


def _fake_backward(grad: Tensor, z_values: Tensor, z_indices: Tensor, V: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(rest[-2], z_values, V)


UPSTREAM = (
    "Tensor z_values, Tensor z_indices, Tensor V, Tensor connections, Tensor? order, Tensor? starts, SymInt upstream"
)
_backward = define(
    f"virtual_matmul_backward(Tensor grad, {UPSTREAM}, SymInt scratch_bytes, bool[] needed, str backend)"
    " -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_virtual_matmul = define(
    f"virtual_matmul({UPSTREAM}, SymInt scratch_bytes, str backend) -> Tensor", _run, _fake, _differentiate, _save
)
