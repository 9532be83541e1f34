"""JumpReLU on the strongest pre-activations of each token, which the kernels of TopK find in a fixed number of slots.

Candidates are those that are highest above a `floor` at the lower end of their threshold's rectangle: with biases less
that floor, they are the strongest. Nothing waits for the device.
"""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._torch_rows import accumulation_dtype, add_at_


def floor(threshold: Tensor, bandwidth: float, b_enc: Tensor) -> tuple[Tensor, Tensor]:
    """The pre-activation [F] that a candidate must exceed, in float32 or wider, and what `b_enc` is less it, in the
    dtype of `b_enc`: at most the lower end of the gradient's rectangle around the threshold, and never negative.

    The difference of both biases is exact, whatever the dtype, so that pre-activations can be had back.
    """
    wide = accumulation_dtype(b_enc.dtype)
    own, limit = b_enc.detach().to(wide), (threshold.detach().to(wide) - bandwidth / 2).clamp_min(0)
    limit = (limit - 2 * torch.finfo(b_enc.dtype).eps * (own - limit).abs()).clamp_min(0)  # what rounding may add
    lowered = torch.where(limit > 0, (own - limit).to(b_enc.dtype), b_enc.detach())
    return own - lowered.to(wide), lowered


def raised(values: Tensor, indices: Tensor, floor: Tensor) -> Tensor:
    """The pre-activations [N, S] of slots that were found with biases less `floor` [F]; 0 in slots without a latent."""
    return torch.where(values == 0, values, (values + floor[indices]).to(values.dtype))


def jump_relu_slots(
    values: Tensor, indices: Tensor, threshold: Tensor, bandwidth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Values [N, S], indices [N, S] and l0 [N] as of `jumprelu_encode`, of candidates with pre-activations `values`;
    those near the threshold keep their slot, with value 0."""
    found, near, l0 = _JumpReLU.apply(values, indices, threshold, bandwidth)
    empty = (found.detach() == 0) & ~near
    return found, indices.masked_fill(empty, -1), l0


class _JumpReLU(torch.autograd.Function):
    """Equivalent to `jumprelu_reference` (`ops/jumprelu_encode.py`) on the candidates' slots."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, indices: Tensor, threshold: Tensor, bandwidth: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = accumulation_dtype(values.dtype)
        at, pre = threshold.to(wide)[indices], values.to(wide)
        off = pre <= at  # not for NaN, which must stay
        near = ((pre - at).abs() < bandwidth / 2) & (values != 0)
        ctx.save_for_backward(indices, threshold, off, near)
        ctx.bandwidth = bandwidth
        ctx.mark_non_differentiable(near)
        return values.masked_fill(off, 0), near, (pre > at).sum(1).to(wide)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None, grad_l0: Tensor) -> tuple[Tensor | None, ...]:
        indices, threshold, off, near = ctx.saved_tensors
        d_threshold = None
        if ctx.needs_input_grad[2]:
            step = 1 / ctx.bandwidth if ctx.bandwidth else 0.0
            pull = (grad * threshold[indices] + grad_l0[:, None]) * -step
            total = torch.zeros_like(threshold, dtype=pull.dtype)
            add_at_(total, indices.flatten(), pull.masked_fill(~near, 0).flatten())
            d_threshold = total.to(threshold.dtype)
        return grad.masked_fill(off, 0), None, d_threshold, None
