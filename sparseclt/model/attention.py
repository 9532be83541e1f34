"""Frozen attention, as the attention modules of sparsely-connected mode read and write through it."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AttentionWeights:
    """The frozen OV circuits of one layer's attention, with the gains and biases of the norms around it folded in.

    `W_V` [H, D, d_head] reads the normalised residual stream, `W_O` [H, d_head, D] writes, and `bias` [D] is
    what attention writes when its linear input is zero (the pattern's rows sum to one); where a norm follows
    attention, it is divided by that norm's scale. `centred`: the norm before attention subtracts the mean over D.
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


def rows_of_heads(W_enc: Tensor, weights: AttentionWeights) -> Tensor:
    """`head_rows` of every head, [H, F, D]."""
    return torch.stack([head_rows(W_enc, weights, head) for head in range(len(weights.W_V))])


def attention_write(base: Tensor, mix: Tensor, weights: AttentionWeights, post_scale: Tensor | None = None) -> Tensor:
    """What attention writes for the residual stream `base` [B, S, D]: [B, S, D].

    `mix` [B, H, S, S]: `Activations.mix`. `post_scale` [B, S]: what a norm behind attention divides by.
    """
    if weights.centred:
        base = centre(base)
    heads = torch.einsum("bhqk,bkd,hde->bhqe", mix, base, weights.W_V)
    bias = weights.bias if post_scale is None else weights.bias / post_scale[..., None]
    return torch.einsum("bhqe,hed->bqd", heads, weights.W_O) + bias
