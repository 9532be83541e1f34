"""The N k largest pre-activations of a batch, in rows of as many latents as each token needs.

forward:  a block of pre-activations at a time; a radix search over 8-bit digits of the keys finds the smallest one to
          keep, among the block's and those kept so far (ragged_slots.py)
backward: that of topk_encode
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launcher
from .ragged_slots import BLOCK, CONFIG, Slots, score_blocks
from .scores import float_key
from .topk_encode import check_encoder

SPAN = 32 * BLOCK  # scores that a program of the histogram counts
BINS = tl.constexpr(256)


@triton.jit
def histogram_kernel(
    scores,  # [total] fp32
    counts,  # [programs, 256] int32 out
    total, prefix, shift,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Counts the positive keys that begin with `prefix` by their next digit of 8 bits (the one from bit `shift`)."""
    program = tl.program_id(0).to(tl.int64)
    bins = tl.zeros((BINS,), tl.int32)
    for start in range(0, tl.minimum(total - program * SPAN, SPAN), BLOCK):
        place = program * SPAN + start + tl.arange(0, BLOCK)
        key = float_key(tl.load(scores + place, mask=place < total, other=0.0), False).to(tl.int64)
        counted = (key > 0) & ((key >> (shift + 8)) == prefix)
        bins += tl.histogram(((key >> shift) & 255).to(tl.int32), BINS, mask=counted)
    tl.store(counts + program * BINS + tl.arange(0, BINS), bins)


@launcher
def forward(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int) -> tuple[Tensor, Tensor]:
    """The N k largest positive pre-activations of the whole batch: values [N, S], indices [N, S] int64.

    Equivalent to `relu(x @ W_enc.T + b_enc).flatten().topk(N * k)`, one row per token; fewer if fewer are positive.
    Ties for the last places go to the first token, then to the lowest latent.

    `x` [N, D], `W_enc` [F, D], `b_enc` [F]. `scratch_bytes` bounds the scores held at a time (at least one token's).
    """
    check_encoder(x, W_enc, b_enc, k)
    N, slots = len(x), Slots(x.device)
    for scores, rows in score_blocks(x, W_enc, b_enc, scratch_bytes):
        bound, room = _batch_bound([slots.values, scores.flatten()], N * k)
        tie = slots.values.view(torch.int32) == bound  # the bits of a positive float are its key
        kept_ties = tie & (tie.cumsum(0) <= room)
        slots.keep((slots.values.view(torch.int32) > bound) | kept_ties)
        slots.append(scores, rows.start, bound=bound, room=room - int(kept_ties.sum()))
    return slots.padded(N, x.dtype)


def _batch_bound(sources: list[Tensor], wanted: int) -> tuple[int, int]:
    """The key of the smallest of the `wanted` largest positive scores, and how many of those share that key.

    Found digit by digit, from the highest: (0, 0) where no more than `wanted` scores are positive.
    """
    bound = 0
    for shift in (24, 16, 8, 0):
        counts = [_histogram(source, bound >> (shift + 8), shift) for source in sources if len(source) > 0]
        digits = torch.stack(counts).sum(0).tolist()
        if shift == 24 and sum(digits) <= wanted:
            return 0, 0
        digit = 255
        while digits[digit] < wanted:
            wanted -= digits[digit]
            digit -= 1
        bound |= digit << shift
    return bound, wanted


def _histogram(scores: Tensor, prefix: int, shift: int) -> Tensor:
    programs = cdiv(len(scores), SPAN)
    counts = torch.empty(programs, BINS.value, dtype=torch.int32, device=scores.device)
    histogram_kernel[(programs,)](scores, counts, len(scores), prefix, shift, SPAN=SPAN, BLOCK=BLOCK, **CONFIG.options)
    return counts.sum(0)
