"""The whole encode of sparsely-connected mode: embedding part, upstream part, top-k."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._rows import SCRATCH_BYTES, chunks, dense, transpose, transposed_gather_sum
from sparseclt.ops.backend import implements, lookup
from sparseclt.ops.checks import check_k, check_shapes, check_tensors
from sparseclt.ops.connections import Connections
from sparseclt.ops.topk_encode import encoder_gradients
from sparseclt.ops.virtual_matmul import add_upstream, check_upstream, gather_slots, virtual_matmul_reference


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
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    """Latents of a module in sparsely-connected mode: values [N, K], descending, and indices [N, K] int64.

    Equivalent to `relu((r0 @ W_enc.T + virtual_matmul(z, V)) / scale[:, None] + b_enc).topk(k)`. A slot whose
    value is zero has no gradient; `scale` is a constant. The [N, F] pre-activations never exist, forward or
    backward: tokens are taken a chunk at a time.

    `r0` [N, D] what does not come from latents (embedding, written biases); `W_enc` [F, D]; `b_enc` [F] or
    None; `z_values` `z_indices` [N, S], `V` and `connections` [F, C], `upstream` as in `virtual_matmul` (a
    module without upstream: S = 0 and U = 0); `scale` [N] the reader's frozen normalisation scale, above 0.
    `scratch_bytes` bounds each working buffer (one token's at least).
    Raises ValueError (shapes, k outside 1..F, ids out of range, devices, backend), TypeError (dtypes).
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
    run = lookup("connected_encode", backend)
    return run(r0, W_enc, b_enc, z_values, z_indices, V, connections, scale, k, scratch_bytes)


@implements("connected_encode", "reference")
def connected_encode_reference(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Connections,
    scale: Tensor,
    k: int,
    scratch_bytes: int = 0,
) -> tuple[Tensor, Tensor]:
    pre = r0 @ W_enc.T + virtual_matmul_reference(z_values, z_indices, V, connections)
    pre = pre / scale.detach()[:, None]
    values, indices = (pre if b_enc is None else pre + b_enc).relu().topk(k)
    return values, indices


@implements("connected_encode", "torch")
def connected_encode_torch(*args: Any) -> tuple[Tensor, Tensor]:
    return _ConnectedEncode.apply(*args)


class _ConnectedEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        r0: Tensor,
        W_enc: Tensor,
        b_enc: Tensor | None,
        z_values: Tensor,
        z_indices: Tensor,
        V: Tensor,
        connections: Connections,
        scale: Tensor,
        k: int,
        scratch_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        values = r0.new_empty(len(r0), k)
        indices = torch.empty(len(r0), k, dtype=torch.int64, device=r0.device)
        scratch = r0.new_empty(0)
        for part in chunks(len(r0), len(W_enc) * r0.element_size(), scratch_bytes):
            if part.start == 0:
                scratch = r0.new_empty(part.stop, len(W_enc))
            pre = torch.mm(r0[part], W_enc.T, out=scratch[: part.stop - part.start])
            add_upstream(pre, z_values[part], z_indices[part], V, connections, scratch_bytes)
            pre /= scale[part, None]
            if b_enc is not None:
                pre += b_enc
            values[part], indices[part] = pre.relu_().topk(k)
        ctx.save_for_backward(r0, W_enc, z_values, z_indices, V, scale, values, indices)
        ctx.connections, ctx.scratch_bytes = connections, scratch_bytes
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        r0, W_enc, z_values, z_indices, V, scale, values, indices = ctx.saved_tensors
        needed = ctx.needs_input_grad
        grad = grad_values * (values > 0)
        scaled = grad / scale[:, None]
        dr0, dW, db = encoder_gradients(grad, scaled, indices, r0, W_enc, needed)
        dz = torch.zeros_like(z_values) if needed[3] else None
        dV = torch.zeros_like(V) if needed[5] else None
        U, C = ctx.connections.upstream, V.shape[1]
        if U > 0 and C > 0:
            token_bytes = (2 * U + 3 * indices.shape[1] * C) * V.element_size()
            for part in chunks(len(r0), token_bytes, ctx.scratch_bytes):
                _add_upstream_gradients(dz, dV, scaled, indices, z_values, z_indices, V, ctx.connections, part)
        return dr0, dW, db, dz, None, dV, None, None, None, None


def _add_upstream_gradients(
    dz: Tensor | None,
    dV: Tensor | None,
    grad: Tensor,
    indices: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Connections,
    part: slice,
) -> None:
    """Gradients through the connections of the selected latents only, for a chunk of tokens.

    A few thousand pairs a token instead of all F x C, which pays from small F on.
    """
    selected, grad, slots = indices[part], grad[part], z_indices[part]
    n, K = selected.shape
    latents = selected.flatten()  # index_select copies whole rows, several times faster than indexing
    read = connections.indices.index_select(0, latents).view(n, -1)  # [n, K*C] upstream ids
    if dV is not None:
        z = dense(z_values[part], slots, connections.upstream)
        by_latent = transpose(selected, len(V))
        dV += transposed_gather_sum(grad.reshape(-1, 1), by_latent, gather_slots(z, read).view(n * K, -1))
    if dz is not None:
        written = (grad[:, :, None] * V.index_select(0, latents).view(n, K, -1)).view(n, -1)
        dz[part] = gather_slots(dense(written, read, connections.upstream), slots)
