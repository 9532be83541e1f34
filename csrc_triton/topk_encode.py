"""Encoders that keep k latents per token and never store all pre-activations; and their gradients.

forward:  tiles of pre-activations with group maxima go to a bounded scratch (scores.py); the k largest of each row are
          selected exactly (stream.py, select.py)
backward: active slots only, through the products of rows.py

Sums are float32, and selection sees them before they are rounded to the input dtype. A NaN pre-activation counts as
the largest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, cdiv, launcher, pow2, spans
from .place import place
from .rows import gather_sum, transposed_gather_sum
from .scores import LOWEST, encoder_scores, float_key
from .stream import plan, streamed_topk
from .transpose import Transpose, transpose

ACTIVATIONS = ("topk", "abstopk", "groupmax")
GROUP_TILE = 2048  # scores that a program of groupmax holds


@dataclass(frozen=True)
class GroupTile(LaunchConfig):
    """Scores of a run that are held at a time; a tile has as many pairs of token and run as fit."""

    num_warps: int = 8
    block: int = 16

    @property
    def pairs(self) -> int:
        return GROUP_TILE // self.block

    @property
    def constexprs(self) -> dict[str, int]:
        return {"PAIRS": self.pairs, "BLOCK": self.block}


@triton.jit
def groupmax_kernel(
    scores,  # [n, F] fp32
    values,  # [n, k] fp32 out
    ids,  # [n, k] int32 out
    pairs, F, k, longest,
    scores_row,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest of each run of latents, the lowest id among equals. A row of the tile is a token and a run."""
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    run = pair % k
    first = run * F // k
    end = (run + 1) * F // k
    row = scores + (pair // k)[:, None] * scores_row
    best_key = tl.full((PAIRS,), LOWEST, tl.int32)
    best_id = first
    for start in range(0, longest, BLOCK):
        column = first[:, None] + start + tl.arange(0, BLOCK)[None, :]
        valid = (pair < pairs)[:, None] & (column < end[:, None])
        key = float_key(tl.load(row + column, mask=valid, other=0.0), False)
        key = tl.where(valid, key, LOWEST)
        block_key = tl.max(key, axis=1)
        block_id = tl.min(tl.where(key == block_key[:, None], column, F), axis=1)
        best_id = tl.where(block_key > best_key, block_id, best_id)
        best_key = tl.maximum(block_key, best_key)
    there = pair < pairs
    value = tl.load(scores + (pair // k) * scores_row + best_id, mask=there, other=0.0)
    tl.store(values + pair, value, mask=there)
    tl.store(ids + pair, best_id.to(tl.int32), mask=there)


@launcher
def forward(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: str, scratch_bytes: int
) -> tuple[Tensor, Tensor]:
    """Values [N, k] in descending order, indices [N, k] int64; ties go to the lowest index.

    With `pre = x @ W_enc.T + b_enc` [N, F]: "topk" is relu of the k largest, "abstopk" the k largest in magnitude
    with their signs, "groupmax" relu of the largest of each of k runs of latents (run g starts at g F // k).

    `x` [N, D], `W_enc` [F, D], `b_enc` [F]. `scratch_bytes` bounds working memory (at least one token's).
    """
    check_encoder(x, W_enc, b_enc, k)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    N, F = len(x), len(W_enc)
    values = torch.empty(N, k, dtype=x.dtype, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    if activation == "groupmax":
        _groupmax(x, W_enc, b_enc, k, scratch_bytes, values, indices)
        return values, indices
    absolute = activation == "abstopk"

    def fill(rows: slice, columns: slice, scores: Tensor, maxima: Tensor | None, group: int) -> None:
        bias = None if b_enc is None else b_enc[columns]
        encoder_scores(x[rows], W_enc[columns], bias, None, scores, maxima, group, absolute=absolute)

    streamed_topk(fill, N, F, k, scratch_bytes, values, indices, relu=not absolute, absolute=absolute)
    return values, indices


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> None:
    F, D = W_enc.shape
    if x.shape[1] != D:
        raise ValueError(f"x: expected shape [N, {D}], as W_enc has {D} columns, got {tuple(x.shape)}")
    if b_enc is not None and b_enc.shape != (F,):
        raise ValueError(f"b_enc: expected shape [{F}], one per latent, got {tuple(b_enc.shape)}")
    if W_enc.dtype != x.dtype or (b_enc is not None and b_enc.dtype not in (x.dtype, torch.float32)):
        got = W_enc.dtype if b_enc is None else f"{W_enc.dtype} and {b_enc.dtype}"
        raise TypeError(
            f"W_enc, b_enc: expected {x.dtype}, the dtype of x (b_enc: or float32), got {got}; cast them or x"
        )
    if not 1 <= k <= F:
        raise ValueError(f"k: expected from 1 to {F}, the number of latents, got {k}")


def _groupmax(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int, values: Tensor, indices: Tensor
) -> None:
    N, F = len(x), len(W_enc)
    if N == 0:
        return
    size, longest = plan(N, F, k, scratch_bytes, whole_rows=True).rows, cdiv(F, k)
    tile = GroupTile(block=pow2(longest, 16, GROUP_TILE))
    scratch = torch.empty(size, F, dtype=torch.float32, device=x.device)
    best_values = torch.empty(size, k, dtype=torch.float32, device=x.device)
    best_ids = torch.empty(size, k, dtype=torch.int32, device=x.device)
    for rows in spans(N, size):
        n = rows.stop - rows.start
        encoder_scores(x[rows], W_enc, b_enc, None, scratch[:n], None, 1)
        groupmax_kernel[(cdiv(n * k, tile.pairs),)](
            scratch, best_values, best_ids, n * k, F, k, longest, F, **tile.constexprs, **tile.options
        )
        place(best_values[:n], best_ids[:n], values[rows], indices[rows], relu=True)


@launcher
def backward(
    grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx [N, D], dW [F, D] and db [F] from `grad_values` [N, K]; None where not `needed`.

    Slots with any non-zero value (NaN included) carry gradient, and only those, whatever the activation.
    """
    active = values != 0
    grad = torch.where(active, grad_values, 0)
    return encoder_gradients(grad, grad, indices.masked_fill(~active, -1), x, W_enc, needed)


def encoder_gradients(
    grad: Tensor,
    grad_linear: Tensor,
    slots: Tensor,
    x: Tensor,
    W_enc: Tensor,
    needed: Sequence[bool],
    by_latent: Transpose | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc and b_enc from those of the pre-activations, and of `x @ W_enc.T` (`grad_linear`), [N, K].

    `slots` [N, K] are latents, or -1 where inactive. Inactive slots are never read, so an infinite row of weights
    behind one does no harm. `by_latent`: their transpose, where it is known.
    """
    dx = gather_sum(grad_linear, slots, W_enc) if needed[0] else None
    dW = db = None
    if needed[1] or needed[2]:
        order, starts = by_latent or transpose(slots, len(W_enc))
        dW = transposed_gather_sum(grad_linear, order, starts, x) if needed[1] else None
        db = _sum_by_latent(grad, order, starts, x.dtype) if needed[2] else None
    return dx, dW, db


def _sum_by_latent(weights: Tensor, order: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """[F]: the sum of each latent's slots, in the order of the tokens."""
    ones = torch.ones(1, 1, dtype=dtype, device=weights.device).expand(len(weights), 1)
    return transposed_gather_sum(weights, order, starts, ones).flatten()
