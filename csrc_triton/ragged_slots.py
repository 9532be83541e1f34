"""Slots of encoders whose tokens keep as many latents as they need: shared by batchtopk_encode and jumprelu_encode.

A ragged row is padded to the length of the fullest one, never cut: slots [N, S], index -1 and value 0 in the padding,
values in descending order. The number of slots depends on the scores, so every block of tokens waits for the device a
few times.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, spans
from .place import place
from .scores import encoder_scores, float_key
from .stream import plan

BLOCK = 1024  # scores that a program reads at a time
CONFIG = LaunchConfig()


@triton.jit
def _kept(
    value, columns, F, bound, threshold, threshold_step, half_window,
    JUMP: tl.constexpr,
):  # fmt: skip
    """Which scores are kept for certain, which if there is room (batchtopk: equal to the bound), and their values."""
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
    n, F, bound,
    threshold_step, half_window,
    JUMP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The number of slots of one token."""
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
    room,  # [n] int64: how many of its ties, the first ones, a row keeps
    starts,  # [n] int64: where a row's slots begin
    values,  # [slots] fp32 out
    ids,  # [slots] int32 out
    F, bound,
    threshold_step, half_window,
    JUMP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The slots of one token, in the order of its latents."""
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


class Slots:
    """The slots kept so far, in the order of tokens and, within a token, of latents."""

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
        """Adds the slots of a block of scores [n, F].

        With a `threshold` [F] (jumprelu): the positive scores above it, and those less than `half_window` away from
        it as zeros. Without (batchtopk): the scores with a key above `bound`, and the first `room` equal to it.
        """
        n, F = scores.shape
        counts = torch.empty(2, n, dtype=torch.int32, device=scores.device)
        limit = scores if threshold is None else threshold
        step = 0 if threshold is None else threshold.stride(0)
        options = {"JUMP": threshold is not None, "BLOCK": BLOCK, **CONFIG.options}
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
        """Values [N, S] in descending order and indices [N, S] int64, where S is the length of the fullest row."""
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
        place(values, ids, out_values, indices, relu=False)
        return out_values, indices


def score_blocks(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, scratch_bytes: int) -> Iterator[tuple[Tensor, slice]]:
    """Pre-activations [n, F] fp32 of one block of tokens after the other, in one reused buffer, and their tokens."""
    N, F = len(x), len(W_enc)
    if N == 0:
        return
    size = plan(N, F, 1, scratch_bytes, whole_rows=True).rows
    scratch = torch.empty(size, F, dtype=torch.float32, device=x.device)
    for rows in spans(N, size):
        scores = scratch[: rows.stop - rows.start]
        encoder_scores(x[rows], W_enc, b_enc, None, scores, None, 1)
        yield scores, rows
