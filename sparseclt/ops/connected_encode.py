"""The whole encode of sparsely-connected mode: embedding part, upstream part, top-k."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._encode import encode, encoder_gradients
from sparseclt.ops._registration import define, fake_gradients, if_needed, present
from sparseclt.ops._rows import accumulation_dtype, chunks, dense, transpose, transposed_gather_sum
from sparseclt.ops.backend import choose, implementation, register
from sparseclt.ops.checks import check_ids, check_k, check_scratch, check_shapes, check_tensors
from sparseclt.ops.connections import Connections
from sparseclt.ops.topk_encode import select_reference
from sparseclt.ops.virtual_matmul import (
    UPSTREAM,
    Upstream,
    add_upstream,
    check_upstream,
    gather_slots,
    virtual_matmul_reference,
)


def connected_encode(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor | Connections,
    scale: Tensor,
    k: int,
    *,
    upstream: int | None = None,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents of a module in sparsely-connected mode: values [N, K], descending, and indices [N, K] int64.

    Equivalent to `relu((r0 @ W_enc.T + virtual_matmul(z, V)) / scale[:, None] + b_enc).topk(k)`. Ties, NaN and
    what has a gradient are as in `topk_encode`; `scale` is a constant. The [N, F] pre-activations never exist,
    forward or backward: tokens are taken a chunk at a time.

    `r0` [N, D] what does not come from latents (embedding, written biases); `W_enc` [F, D]; `b_enc` [F] or
    None; `z_values` `z_indices` [N, S], `V` and `connections` [F, C], `upstream` as in `virtual_matmul` (a
    module without upstream: S = 0 and U = 0); `scale` [N] the reader's frozen normalisation scale, above 0.
    `scratch_bytes` bounds each working buffer (one token's at least; None: what suits the backend).
    Raises ValueError (shapes, k outside 1..F, ids out of range, devices, backend), TypeError (dtypes),
    ImportError (backend not installed).
    """
    check_tensors(r0=r0, W_enc=W_enc, b_enc=b_enc, z_values=z_values, V=V, scale=scale)
    connections = check_upstream(z_values, z_indices, V, connections, upstream)
    sizes = check_shapes(
        r0=(r0, "N D"),
        W_enc=(W_enc, "F D"),
        b_enc=(b_enc, "F"),
        z_values=(z_values, "N S"),
        V=(V, "F C"),
        scale=(scale, "N"),
    )
    check_k(k, sizes["F"])
    backend = choose("connected_encode", backend, r0)
    if backend == "reference":
        return connected_encode_reference(r0, W_enc, b_enc, z_values, z_indices, V, connections, scale, k)
    order = starts = None
    if implementation("connected_encode", backend).csc:
        order, starts = connections.transposed
    values, indices = _connected_encode(
        r0, W_enc, b_enc, scale, z_values, z_indices, V, connections.indices, order, starts,
        connections.upstream, k, check_scratch(scratch_bytes, backend), backend,
    )  # fmt: skip
    return values, indices


def connected_pre_activations(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Connections,
    scale: Tensor,
) -> Tensor:
    """[N, F], for references."""
    pre = r0 @ W_enc.T + virtual_matmul_reference(z_values, z_indices, V, connections)
    pre = pre / scale.detach()[:, None]
    return pre if b_enc is None else pre + b_enc


def connected_encode_reference(*args: Any) -> tuple[Tensor, Tensor]:
    *inputs, k = args
    return select_reference(connected_pre_activations(*inputs), k)


def forward_torch(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    scale: Tensor,
    upstream: Upstream,
    k: int,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    def finish(pre: Tensor, part: slice) -> None:
        add_upstream(pre, upstream, part, scratch_bytes)
        pre /= scale[part, None]
        if b_enc is not None:
            pre += b_enc

    return encode(r0, W_enc, None, k, "topk", scratch_bytes, finish)


def backward_torch(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    r0: Tensor,
    W_enc: Tensor,
    scale: Tensor,
    upstream: Upstream,
    scratch_bytes: int,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of r0, W_enc, b_enc, z_values and V from that of the selected values [N, K]."""
    z_values, z_indices, V, connections, _, _, U = upstream
    dtype, wide = V.dtype, accumulation_dtype(V.dtype)
    grad = grad_values.masked_fill(values == 0, 0)
    scaled = grad / scale[:, None]
    dr0, dW, db = encoder_gradients(grad, scaled, indices, r0, W_enc, needed)
    scaled, z_values, V = scaled.to(wide), z_values.to(wide), V.to(wide)
    dz = z_values.new_zeros(z_values.shape) if needed[3] else None
    dV = V.new_zeros(V.shape) if needed[4] else None
    C = V.shape[1]
    if U > 0 and C > 0:
        token_bytes = (2 * U + 3 * indices.shape[1] * C) * V.element_size()
        for part in chunks(len(r0), token_bytes, scratch_bytes):
            read = (connections, U, indices[part], scaled[part])
            _add_upstream_gradients(dz, dV, *read, z_values[part], z_indices[part], V, part)
    return dr0, dW, db, dz if dz is None else dz.to(dtype), dV if dV is None else dV.to(dtype)


def _add_upstream_gradients(
    dz: Tensor | None,
    dV: Tensor | None,
    connections: Tensor,
    upstream: int,
    selected: Tensor,
    grad: Tensor,
    z_values: Tensor,
    slots: Tensor,
    V: Tensor,
    part: slice,
) -> None:
    """Gradients through the connections of the selected latents only, for a chunk of tokens.

    A few thousand pairs a token instead of all F x C, which pays from small F on.
    """
    n, K = selected.shape
    latents = selected.flatten()  # index_select copies whole rows, several times faster than indexing
    read = connections.index_select(0, latents).view(n, -1)  # [n, K*C] upstream ids
    if dV is not None:
        z = dense(z_values, slots, upstream)
        by_latent = transpose(selected, len(V))
        dV += transposed_gather_sum(grad.reshape(-1, 1), by_latent, gather_slots(z, read).view(n * K, -1))
    if dz is not None:
        written = (grad[:, :, None] * V.index_select(0, latents).view(n, K, -1)).view(n, -1)
        dz[part] = gather_slots(dense(written, read, upstream), slots)


register("connected_encode", "reference", connected_encode_reference)
register("connected_encode", "torch", forward_torch, backward_torch)


def _run(*args: Any) -> tuple[Tensor, Tensor]:
    r0, W_enc, b_enc, scale, *arguments, k, scratch_bytes, backend = args
    upstream = Upstream(*arguments)
    check_ids("z_indices", upstream.z_indices, upstream.size, "upstream latents")
    return implementation("connected_encode", backend).forward(r0, W_enc, b_enc, scale, upstream, k, scratch_bytes)


def _fake(r0: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    k = args[-3]
    return r0.new_empty(len(r0), k), r0.new_empty(len(r0), k, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    r0, W_enc, _, *rest, ctx.upstream, _, ctx.scratch_bytes, ctx.backend = inputs
    ctx.save_for_backward(*output, r0, W_enc, *rest)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad
    needed = [*need[:3], need[4], need[6]]
    grads = _backward(grad_values, *ctx.saved_tensors, ctx.upstream, ctx.scratch_bytes, needed, ctx.backend)
    dr0, dW, db, dz, dV = if_needed(needed, grads)
    return dr0, dW, db, None, dz, None, dV, *[None] * 7


def _run_backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, scratch_bytes, needed, backend = args
    run = implementation("connected_encode", backend).gradients
    return present(*run(*tensors[:6], Upstream(*tensors[6:]), scratch_bytes, needed))


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    r0, W_enc, _, z_values, _, V = args[3:9]
    return fake_gradients(args[-2], r0, W_enc, W_enc.new_empty(len(W_enc)), z_values, V)


_backward = define(
    "connected_encode_backward(Tensor grad_values, Tensor values, Tensor indices, Tensor r0, Tensor W_enc,"
    f" Tensor scale, {UPSTREAM}, SymInt scratch_bytes, bool[] needed, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_connected_encode = define(
    f"connected_encode(Tensor r0, Tensor W_enc, Tensor? b_enc, Tensor scale, {UPSTREAM}, SymInt k,"
    " SymInt scratch_bytes, str backend) -> (Tensor, Tensor)",
    _run,
    _fake,
    _differentiate,
    _save,
)
