"""Pre-activations above a threshold of each latent's own, in rows of as many latents as each token needs.

forward:  a block of pre-activations at a time; kernels that count and compact a token's slots (ragged_slots.py)
backward: that of topk_encode; the threshold collects from the slots near it as a bias does
"""

from torch import Tensor

from .launch import launcher
from .ragged_slots import Slots, score_blocks
from .topk_encode import check_encoder


@launcher
def forward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    bandwidth: float,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Positive pre-activations above their latent's threshold: values [N, S], indices [N, S] int64, near [N, S] bool.

    Equivalent to `relu(pre) * (pre > threshold)` with `pre = x @ W_enc.T + b_enc`, one padded row per token. Latents
    within half a `bandwidth` of their threshold but not above it also have a slot, of value 0. `near` marks all slots
    within half a bandwidth, above or below: those give the threshold its straight-through gradient.

    `x` [N, D], `W_enc` [F, D], `b_enc` [F], `threshold` [F], above 0. `scratch_bytes` bounds the scores held at a time.
    """
    check_encoder(x, W_enc, b_enc, 1)
    if threshold.shape != (len(W_enc),):
        raise ValueError(f"threshold: expected shape [{len(W_enc)}], one per latent, got {tuple(threshold.shape)}")
    slots = Slots(x.device)
    for scores, rows in score_blocks(x, W_enc, b_enc, scratch_bytes):
        slots.append(scores, rows.start, threshold=threshold, half_window=bandwidth / 2)
    values, indices = slots.padded(len(x), x.dtype)
    limit = threshold.float()[indices.clamp_min(0)] + bandwidth / 2
    return values, indices, (indices >= 0) & (values.float() < limit)
