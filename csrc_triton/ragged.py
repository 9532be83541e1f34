"""Encoders whose tokens have as many latents as they need: batchtopk and jumprelu.

A ragged row is padded to the fullest one, never cut: slots [N, S], index -1 and value 0 in the padding, values in
descending order. How many slots there are depends on the numbers, so both wait for the device, a few times a block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import select
from .launch import AheadOfTime, ahead_of_time_case, cdiv, launcher
from .scores import encoder_scores, float_key
from .stream import SCRATCH_BYTES, plan, spans
from .topk_encode import check_encoder, encoder_gradients, sum_by_latent
from .transpose import transpose

BLOCK = 1024  # scores that a program looks at at a time
SPAN = 32 * BLOCK  # scores that a program of the histogram counts
BINS = tl.constexpr(256)


@triton.jit
def histogram_kernel(
    scores,  # [total] fp32
    counts,  # [programs, 256] int32 out
    total,
    prefix,
    shift,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many positive keys that begin with `prefix` have each next digit of 8 bits (from bit `shift` on)."""
    program = tl.program_id(0).to(tl.int64)
    bins = tl.zeros((BINS,), tl.int32)
    for start in range(0, tl.minimum(total - program * SPAN, SPAN), BLOCK):
        place = program * SPAN + start + tl.arange(0, BLOCK)
        key = float_key(tl.load(scores + place, mask=place < total, other=0.0), False).to(tl.int64)
        counted = (key > 0) & ((key >> (shift + 8)) == prefix)
        bins += tl.histogram(((key >> shift) & 255).to(tl.int32), BINS, mask=counted)
    tl.store(counts + program * BINS + tl.arange(0, BINS), bins)


@triton.jit
def _kept(
    value,
    columns,
    F,
    bound,
    threshold,
    threshold_step,
    half_window,
    JUMP: tl.constexpr,
):
    """Kept for certain; kept if there is room (batchtopk: equal to the bound); the value to store."""
    inside = columns < F
    if JUMP:
        limit = tl.load(threshold + columns.to(tl.int64) * threshold_step, mask=inside, other=0.0).to(tl.float32)
        active = ((value > limit) & (value > 0.0)) | (value != value)
        keep = active | (tl.abs(value - limit) < half_window)
        return keep & inside, inside & False, tl.where(active, value, 0.0)
    else:
        key = float_key(value, False)
        return (key > bound) & inside, (key == bound) & inside, value


@triton.jit
def count_kernel(
    scores,  # [n, F] fp32
    threshold,  # [F] (JUMP)
    counts,  # [2, n] int32 out: kept for certain, kept if there is room
    n,
    F,
    bound,
    threshold_step,
    half_window,
    JUMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    certain = tl.zeros((BLOCK,), tl.int32)
    possible = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(scores + row * F + columns, mask=columns < F, other=0.0)
        keep, tie, value = _kept(value, columns, F, bound, threshold, threshold_step, half_window, JUMP)
        certain += keep.to(tl.int32)
        possible += tie.to(tl.int32)
    tl.store(counts + row, tl.sum(certain, axis=0))
    tl.store(counts + n + row, tl.sum(possible, axis=0))


@triton.jit
def compact_kernel(
    scores,  # [n, F] fp32
    threshold,  # [F] (JUMP)
    room,  # [n] int64: how many ties a row keeps, its first
    starts,  # [n] int64: where a row's slots begin
    values,  # [slots] fp32 out
    ids,  # [slots] int32 out
    F,
    bound,
    threshold_step,
    half_window,
    JUMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    ties_left = tl.load(room + row)
    place = tl.load(starts + row)
    for start in range(0, F, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(scores + row * F + columns, mask=columns < F, other=0.0)
        keep, tie, value = _kept(value, columns, F, bound, threshold, threshold_step, half_window, JUMP)
        ties = tie.to(tl.int32)
        keep = keep | (tie & (tl.cumsum(ties, axis=0) <= ties_left))
        kept = keep.to(tl.int32)
        slot = place + tl.cumsum(kept, axis=0) - kept
        tl.store(values + slot, value, mask=keep)
        tl.store(ids + slot, columns, mask=keep)
        ties_left -= tl.sum(ties, axis=0)
        place += tl.sum(kept, axis=0)


class _Slots:
    """Kept slots of all tokens so far, in the order of tokens and latents."""

    def __init__(self, device: torch.device) -> None:
        self.values = torch.empty(0, dtype=torch.float32, device=device)
        self.ids = torch.empty(0, dtype=torch.int32, device=device)
        self.tokens = torch.empty(0, dtype=torch.int64, device=device)

    def keep(self, chosen: Tensor) -> None:
        self.values, self.ids, self.tokens = self.values[chosen], self.ids[chosen], self.tokens[chosen]

    def append(
        self,
        scores: Tensor,
        first_token: int,
        *,
        bound: int = 0,
        room: int = 0,
        threshold: Tensor | None = None,
        half_window: float = 0.0,
    ) -> None:
        """Adds what a block of scores [n, F] keeps."""
        n, F = scores.shape
        counts = torch.empty(2, n, dtype=torch.int32, device=scores.device)
        limit = scores if threshold is None else threshold
        step = 0 if threshold is None else threshold.stride(0)
        options = {"JUMP": threshold is not None, "BLOCK": BLOCK}
        count_kernel[(n,)](scores, limit, counts, n, F, bound, step, half_window, **options)
        certain, ties = counts.long()
        rooms = (room - (ties.cumsum(0) - ties)).clamp_min(0).minimum(ties)
        lengths = certain + rooms
        ends = lengths.cumsum(0)
        total = int(ends[-1])
        values = torch.empty(total, dtype=torch.float32, device=scores.device)
        ids = torch.empty(total, dtype=torch.int32, device=scores.device)
        starts = ends - lengths
        compact_kernel[(n,)](scores, limit, rooms, starts, values, ids, F, bound, step, half_window, **options)
        tokens = torch.arange(first_token, first_token + n, device=scores.device)
        self.values = torch.cat([self.values, values])
        self.ids = torch.cat([self.ids, ids])
        self.tokens = torch.cat([self.tokens, tokens.repeat_interleave(lengths, output_size=total)])

    def padded(self, N: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Values [N, S] in descending order and indices [N, S], S the fullest row's."""
        device = self.ids.device
        starts = torch.searchsorted(self.tokens, torch.arange(N + 1, device=device))
        S = int(starts.diff().max()) if N > 0 else 0
        slots = torch.arange(len(self.tokens), device=device) - starts[self.tokens]
        values = torch.zeros(N, S, dtype=torch.float32, device=device)
        ids = torch.full((N, S), -1, dtype=torch.int32, device=device)
        values[self.tokens, slots] = self.values
        ids[self.tokens, slots] = self.ids
        out_values = torch.empty(N, S, dtype=dtype, device=device)
        indices = torch.empty(N, S, dtype=torch.int64, device=device)
        select.place(values, ids, out_values, indices, relu=False)
        return out_values, indices


@launcher
def batchtopk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int = SCRATCH_BYTES
) -> tuple[Tensor, Tensor]:
    """The N k largest positive pre-activations of the whole batch: values [N, S] and indices [N, S] int64.

    Equivalent to `relu(x @ W_enc.T + b_enc).flatten().topk(N * k)` in rows of tokens. Fewer, if fewer are positive.
    Ties at the last place go to the first token, then to the lowest latent.
    """
    check_encoder(x, W_enc, b_enc, k)
    N, slots = len(x), _Slots(x.device)
    for scores, rows in _blocks(x, W_enc, b_enc, scratch_bytes):
        bound, room = _batch_bound([slots.values, scores.flatten()], N * k)
        tie = slots.values.view(torch.int32) == bound  # the bits of a positive float are its key
        kept_ties = tie & (tie.cumsum(0) <= room)
        slots.keep((slots.values.view(torch.int32) > bound) | kept_ties)
        slots.append(scores, rows.start, bound=bound, room=room - int(kept_ties.sum()))
    return slots.padded(N, x.dtype)


def _batch_bound(sources: list[Tensor], wanted: int) -> tuple[int, int]:
    """The key of the last of the `wanted` largest positive scores, and how many equal to it are among them."""
    bound = 0
    for shift in (24, 16, 8, 0):
        counts = sum(_histogram(source, bound >> (shift + 8), shift) for source in sources if len(source) > 0)
        digits = counts.tolist()
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
    histogram_kernel[(programs,)](scores, counts, len(scores), prefix, shift, SPAN=SPAN, BLOCK=BLOCK)
    return counts.sum(0)


@launcher
def jumprelu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    scratch_bytes: int = SCRATCH_BYTES,
    bandwidth: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The positive pre-activations above their latent's `threshold` [F]: values [N, S] and indices [N, S] int64.

    With a `bandwidth`, latents less than half of it away from their threshold have a slot too, worth 0 where they
    are not above: `jumprelu_backward` gives such slots the straight-through gradient of the threshold.
    """
    check_encoder(x, W_enc, b_enc, 1)
    if threshold.shape != (len(W_enc),):
        raise ValueError(f"threshold: expected shape [{len(W_enc)}], one a latent, got {tuple(threshold.shape)}")
    slots = _Slots(x.device)
    for scores, rows in _blocks(x, W_enc, b_enc, scratch_bytes):
        slots.append(scores, rows.start, threshold=threshold, half_window=bandwidth / 2)
    return slots.padded(len(x), x.dtype)


def _blocks(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, scratch_bytes: int):  # type: ignore[no-untyped-def]
    """Scores [n, F] of a block of tokens after another, in one buffer."""
    N, F = len(x), len(W_enc)
    if N == 0:
        return
    size = plan(N, F, 1, scratch_bytes, whole_rows=True).rows
    scratch = torch.empty(size, F, dtype=torch.float32, device=x.device)
    for rows in spans(N, size):
        scores = scratch[: rows.stop - rows.start]
        encoder_scores(x[rows], W_enc, b_enc, None, scores, None, 1)
        yield scores, rows


def jumprelu_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dW, db of the active slots, and d threshold [F] of those within half a bandwidth of it.

    The straight-through gradient (Rajamanoharan et al., 2024, arXiv 2407.14435): a rectangle of width `bandwidth`
    and area 1 stands for the derivative of the step, times minus the threshold.
    """
    active = (values > 0) & (indices >= 0)
    grad = torch.where(active, grad_values, 0)
    gradients = encoder_gradients(grad, grad, indices.masked_fill(~active, -1), x, W_enc, needs[:3])
    d_threshold = None
    if needs[3]:
        limit = threshold.float()[indices.clamp_min(0)]
        near = (indices >= 0) & ((values == 0) | ((values.float() - limit).abs() < bandwidth / 2))
        weight = torch.where(near, grad_values * limit / -max(bandwidth, 1e-30), 0)
        order, starts = transpose(indices.masked_fill(~near, -1), len(W_enc))
        d_threshold = sum_by_latent(weight, order, starts, threshold.dtype)
    return *gradients, d_threshold


def ahead_of_time() -> list[AheadOfTime]:
    kernels = []
    types = {"scores": "*fp32:16", "values": "*fp32:16", "ids": "*i32:16", "counts": "*i32:16", "threshold": "*bf16:16"}
    types |= {"room": "*i64:16", "starts": "*i64:16", "F": "i32:16", "half_window": "fp32", "threshold_step": "i32"}

    def add(kernel, name: str, constexprs: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
        kernels.append(ahead_of_time_case(name, kernel, types, constexprs, {"num_warps": 4, "num_stages": 3}))

    add(histogram_kernel, "batchtopk histogram", {"SPAN": SPAN, "BLOCK": BLOCK})
    for jump in (False, True):
        name = "jumprelu" if jump else "batchtopk"
        add(count_kernel, f"{name} count", {"JUMP": jump, "BLOCK": BLOCK})
        add(compact_kernel, f"{name} compact", {"JUMP": jump, "BLOCK": BLOCK})
    return kernels
