"""What an attention module reads in sparsely-connected mode: the heads' OV circuits under the frozen pattern.

    pre[q] = b_enc + W_enc bias
             + sum_h sum_k A[h,q,k] / scale[k] * (W_enc OV_h^T base[k] + sum_c V_h[i,c] z[k, conn[i,c]])

`base` is the embedding with the biases already written; everything is mixed by the pattern, at the key's
scale. The [N, H, F] tensor never exists: sequences are taken a bounded chunk at a time, head after head, and
the backward pass recomputes a chunk instead of keeping it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt import ops

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


def _pre_activations(x, W_enc, b_enc, z_values, z_indices, V, mix, connections, backend) -> Tensor:
    """[b, S, F] for b sequences."""
    b, _, S, _ = mix.shape
    pre = x @ W_enc.T + b_enc
    for head in range(len(V)):
        upstream = ops.virtual_matmul(
            z_values.flatten(0, 1), z_indices.flatten(0, 1), V[head], connections, backend=backend
        )
        pre = pre + mix[:, head] @ upstream.view(b, S, -1)
    return pre


class _AttentionEncode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W_enc, b_enc, z_values, z_indices, V, mix, connections, k, backend, scratch_bytes):
        B, _, S, _ = mix.shape
        chunk = max(1, scratch_bytes // (S * len(W_enc) * x.element_size()))
        values, indices = x.new_empty(B, S, k), torch.empty(B, S, k, dtype=torch.int64, device=x.device)
        for part in (slice(start, start + chunk) for start in range(0, B, chunk)):
            pre = _pre_activations(
                x[part], W_enc, b_enc, z_values[part], z_indices[part], V, mix[part], connections, backend
            )
            top = pre.relu_().topk(k)
            values[part], indices[part] = top.values, top.indices
        ctx.save_for_backward(x, W_enc, b_enc, z_values, z_indices, V, mix, values, indices)
        ctx.connections, ctx.backend, ctx.chunk = connections, backend, chunk
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_values, _):
        x, W_enc, b_enc, z_values, z_indices, V, mix, values, indices = ctx.saved_tensors
        grad_values = grad_values * (values > 0)
        dx, dz = torch.empty_like(x), torch.empty_like(z_values)
        dW, db, dV = torch.zeros_like(W_enc), torch.zeros_like(b_enc), torch.zeros_like(V)
        for start in range(0, len(mix), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in (x[part], W_enc, b_enc, z_values[part], V)]
                x_, W_, b_, z_, V_ = inputs
                pre = _pre_activations(x_, W_, b_, z_, z_indices[part], V_, mix[part], ctx.connections, ctx.backend)
                selected = pre.gather(-1, indices[part])
                dx[part], dW_, db_, dz[part], dV_ = torch.autograd.grad(selected, inputs, grad_values[part])
            dW += dW_
            db += db_
            dV += dV_
        return dx, dW, db, dz, None, dV, None, None, None, None, None


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
    return _AttentionEncode.apply(x, W_enc, b_enc, z_values, z_indices, V, mix, connections, k, backend, scratch_bytes)
