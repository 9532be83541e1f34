"""What an encoder's activation function makes of its strongest pre-activations.

In either mode a module's encoder yields candidates, at most `slots` for each token, by the kernels of TopK: the
strongest positive pre-activations, or, where latents have thresholds, those that are highest above their `floor`. TopK
keeps all of them, as it has K slots. BatchTopK and JumpReLU have more, and choose here. They are exact for tokens that
want no more latents than there are slots; `full_rows` counts those that may.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from sparseclt.model.modules import Latents
from sparseclt.model.sites import Site
from sparseclt.ops.batchtopk_encode import among_largest
from sparseclt.ops.rows import accumulation_dtype, add_at_
from sparseclt.parallel.collectives import gather_rows
from sparseclt.parallel.group import ALONE, Group


def batch_top_k(candidates: Latents, k: int, tokens: int, data: Group = ALONE) -> Latents:
    """BatchTopK (see `ops.batchtopk_encode`): the `tokens * k` largest positive candidates of all rows together, ties
    to the lowest row, then to the lowest latent. The other slots are empty: index -1 and value 0.

    `data`: the ranks that have the other rows, of which there are `tokens` in all. Each chooses among all candidates.
    """
    own = candidates.values.detach()
    kept = among_largest(gather_rows(own, data).flatten(), tokens * k).view(data.size, *own.shape)[data.rank]
    return _only(kept & (own != 0), candidates)


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


def above_floor(candidates: Latents, floor: Tensor) -> Latents:
    """Candidates found with biases less `floor` [F], with the pre-activations that they have without."""
    values, indices = candidates
    raised = (values + floor[indices]).to(values.dtype)
    return Latents(torch.where(values == 0, values, raised), indices)


def above(candidates: Latents, threshold: Tensor) -> Latents:
    """The candidates above their latent's `threshold` [F], which has no gradient; the other slots are empty."""
    at = threshold.detach()[candidates.indices]
    return _only(~(candidates.values.detach() <= at), candidates)


def jump_relu(candidates: Latents, threshold: Tensor, bandwidth: float) -> tuple[Latents, Tensor]:
    """JumpReLU: the candidates above their latent's threshold [F], and the number of them l0 [N].

    Values and gradients are those of `ops.jumprelu_encode`, where they are explained; candidates near the threshold
    keep their slot, with value 0. `l0` is float32 or wider.
    """
    values, near, l0 = _JumpReLU.apply(*candidates, threshold, bandwidth)
    empty = (values.detach() == 0) & ~near
    return Latents(values, candidates.indices.masked_fill(empty, -1)), l0


def full_rows(latents: Latents) -> Tensor:
    """How many tokens use all their slots, and may have wanted more: a scalar."""
    return (latents.values > 0).all(1).sum()


def warn_if_full(latents: Latents, active: int, site: Site) -> None:
    """A warning if a token uses all its slots, as latents that it wanted may have been left out."""
    if full := int(full_rows(latents)):
        slots = latents.values.shape[1]
        warnings.warn(
            f"{site.name}: {full} tokens have {slots} active latents, as many as they have room for with active = "
            f"{active}, and may lack others; a larger active gives them room",
            stacklevel=2,
        )


def _only(kept: Tensor, candidates: Latents) -> Latents:
    return Latents(candidates.values.masked_fill(~kept, 0), candidates.indices.masked_fill(~kept, -1))


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
