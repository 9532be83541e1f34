"""What an attention module reads in sparsely-connected mode: the heads' OV circuits under the frozen pattern.

    pre[q] = b_enc + W_enc bias
             + sum_h sum_k A[h,q,k] / scale[k] * (W_enc OV_h^T base[k] + sum_c V_h[i,c] z[k, conn[i,c]])

`base` is the embedding with the biases already written; everything is mixed by the pattern, at the key's
scale. The [N, H, F] tensor never exists: sequences are taken a bounded chunk at a time, head after head. The
backward pass computes no pre-activation again: the gradients of the selected latents, mixed back to the keys, walk
the same connections.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseclt import ops
from sparseclt.ops._encode import top_k
from sparseclt.ops._rows import chunks
from sparseclt.ops.backend import choose, implementation
from sparseclt.ops.checks import check_scratch
from sparseclt.ops.topk_encode import select_reference
from sparseclt.ops.virtual_matmul import Upstream

SCRATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class AttentionWeights:
    """The frozen OV circuits of one layer's attention, with LayerNorm's gain and bias folded in.

    `W_V` [H, D, d_head] reads the normalised residual stream, `W_O` [H, d_head, D] writes, and `bias` [D] is
    what attention writes when its linear input is zero (the pattern's rows sum to one). `centred`: the norm
    subtracts the mean over D.
    """

    W_V: Tensor
    W_O: Tensor
    bias: Tensor
    centred: bool


def centre(rows: Tensor) -> Tensor:
    """Rows minus their own mean: how a reader behind LayerNorm sees the residual stream."""
    return rows - rows.mean(-1, keepdim=True)


def head_rows(W_enc: Tensor, weights: AttentionWeights, head: int) -> Tensor:
    """Encoder rows [F, D] carried back through head h's OV circuit: `W_enc @ OV_h.T`, centred if the norm is."""
    rows = W_enc @ weights.W_O[head].T @ weights.W_V[head].T
    return centre(rows) if weights.centred else rows


def attention_write(base: Tensor, mix: Tensor, weights: AttentionWeights) -> Tensor:
    """What attention writes for the residual stream `base` [B, S, D]: [B, S, D].

    `mix` [B, H, S, S]: pattern over the key's scale.
    """
    if weights.centred:
        base = centre(base)
    heads = torch.einsum("bhqk,bkd,hde->bhqe", mix, base, weights.W_V)
    return torch.einsum("bhqe,hed->bqd", heads, weights.W_O) + weights.bias


def _chunks(mix: Tensor, F: int, scratch_bytes: int) -> Iterator[slice]:
    """Slices of the B sequences: two buffers [b, S, F] fit in the scratch, one sequence's at least."""
    return chunks(len(mix), 2 * mix.shape[-1] * F * mix.element_size(), scratch_bytes)


class _AttentionEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        x, W_enc, b_enc, z_values, z_indices, V, mix, connections, k, backend, scratch_bytes = args
        (B, S, _), F = x.shape, len(W_enc)
        ctx.csc, ctx.walk_bytes = (*connections.transposed, connections.upstream), check_scratch(None, backend)
        virtual_matmul = implementation("virtual_matmul", backend).forward
        values, indices = x.new_empty(B, S, k), torch.empty(B, S, k, dtype=torch.int64, device=x.device)
        scratch = x.new_empty(0)
        for part in _chunks(mix, F, scratch_bytes):
            z = z_values[part].flatten(0, 1), z_indices[part].flatten(0, 1)
            if part.start == 0:
                scratch = x.new_empty(len(z[0]), F)
            flat = torch.addmm(b_enc, x[part].flatten(0, 1), W_enc.T, out=scratch[: len(z[0])])
            pre = flat.view(-1, S, F)
            for head, weights in enumerate(V):
                written = virtual_matmul(Upstream(*z, weights, connections.indices, *ctx.csc), ctx.walk_bytes)
                pre.baddbmm_(mix[part, head], written.view(-1, S, F))
            top = top_k(flat.relu_(), k)
            values[part], indices[part] = (t.view(-1, S, k) for t in top)
        ctx.save_for_backward(x, W_enc, z_values, z_indices, V, mix, connections.indices, values, indices)
        ctx.backend, ctx.scratch_bytes = backend, scratch_bytes
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, z_values, z_indices, V, mix, connections, values, indices = ctx.saved_tensors
        tokens = (t.flatten(0, 1) for t in (grad_values, values, indices, x))
        encoder = implementation("topk_encode", ctx.backend).gradients
        dx, dW, db = encoder(*tokens, W_enc, list(ctx.needs_input_grad[:3]))
        need_z, need_V = ctx.needs_input_grad[3], ctx.needs_input_grad[5]
        dz = torch.zeros_like(z_values, memory_format=torch.contiguous_format) if need_z else None
        dV = torch.zeros_like(V) if need_V else None
        grad = grad_values.masked_fill(values == 0, 0)
        for part in _chunks(mix, len(W_enc), ctx.scratch_bytes) if need_z or need_V else ():
            _add_upstream_gradients(ctx, part, grad, dz, dV)
        return dx if dx is None else dx.view_as(x), dW, db, dz, None, dV, *[None] * 5


def _add_upstream_gradients(ctx: Any, part: slice, grad: Tensor, dz: Tensor | None, dV: Tensor | None) -> None:
    """Adds the gradients of z_values [B, S, A] and V [H, F, C] from those of the selected latents [B, S, K], for a
    chunk of sequences."""
    _, W_enc, z_values, z_indices, V, mix, connections, _, indices = ctx.saved_tensors
    z = z_values[part].flatten(0, 1), z_indices[part].flatten(0, 1)
    b, S, K = grad[part].shape
    F = len(W_enc)
    # What reaches a key: its patterns' entries for the queries that selected a latent, [b*F, S]. This is the weight
    # gradient of a decoder with one row for each latent of each sequence.
    rows = indices[part] + F * torch.arange(b, device=grad.device)[:, None, None]
    selected = grad[part].reshape(-1, K), rows.view(-1, K), grad.new_empty(()).expand(b * F, S)
    mix_to_keys = implementation("sparse_decode", ctx.backend).gradients
    virtual_matmul = implementation("virtual_matmul", ctx.backend).gradients
    for head, weights in enumerate(V):
        at_keys = mix_to_keys(mix[part, head].reshape(-1, S), *selected, [False, True])[1]
        at_keys = at_keys.view(b, F, S).mT.reshape(-1, F)
        upstream, needed = Upstream(*z, weights, connections, *ctx.csc), [dz is not None, dV is not None]
        dz_, dV_ = virtual_matmul(at_keys, upstream, ctx.walk_bytes, needed)
        if dz is not None:
            dz[part] += dz_.view_as(dz[part])
        if dV is not None:
            dV[head] += dV_


def attention_encode_reference(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    mix: Tensor,
    connections: ops.Connections,
    k: int,
) -> tuple[Tensor, Tensor]:
    pre = x @ W_enc.T + b_enc
    for head, weights in enumerate(V):
        z = z_values.flatten(0, 1), z_indices.flatten(0, 1)
        written = ops.virtual_matmul(*z, weights, connections, backend="reference")
        pre = pre + mix[:, head] @ written.view_as(pre)
    values, indices = select_reference(pre.flatten(0, 1), k)
    return values.unflatten(0, x.shape[:2]), indices.unflatten(0, x.shape[:2])


def attention_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    mix: Tensor,
    connections: ops.Connections,
    k: int,
    *,
    backend: str | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    """Latents of an attention module in sparsely-connected mode: values, indices [B, S, K].

    Equivalent to `relu(x @ W_enc.T + b_enc + sum_h mix[:, h] @ virtual_matmul(z, V[h])).topk(k)`.
    `x` [B, S, D] (what attention writes for the embedding and the biases), `W_enc` [F, D], `b_enc` [F],
    `z_values` `z_indices` [B, S, A] upstream latents, `V` [H, F, C], `mix` [B, H, S, S] (constant).
    """
    backend = choose("virtual_matmul", backend, x)
    if backend == "reference":
        return attention_encode_reference(x, W_enc, b_enc, z_values, z_indices, V, mix, connections, k)
    return _AttentionEncode.apply(x, W_enc, b_enc, z_values, z_indices, V, mix, connections, k, backend, scratch_bytes)
