"""What the encoders of the torch backend share: pre-activations a chunk of tokens at a time, exact selection,
and gradients over selected latents.

Selection looks at pre-activations in their accumulation dtype (fp32 for fp16 and bf16); values are rounded to
the input's dtype once, at the end.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparseclt.ops._rows import TORCH, RowSums, accumulation_dtype, chunks

Adjust = Callable[[Tensor, slice], None]  # changes a chunk of pre-activations in place


def linear_chunks(
    x: Tensor, W: Tensor, bias: Tensor | None, scratch_bytes: int, buffers: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """`x @ W.T + bias` [n, F] for consecutive chunks of tokens, in the accumulation dtype.

    x [N, D], W [F, D]. All chunks come in one buffer, each overwritten by the next: fresh memory costs more than
    the arithmetic. `buffers`: how many of its size fit in the scratch.
    """
    wide = accumulation_dtype(x.dtype)
    scratch = x.new_empty(0)
    for part in chunks(len(x), buffers * len(W) * wide.itemsize, scratch_bytes):
        if part.start == 0:
            scratch = x.new_empty(part.stop, len(W), dtype=wide)
        yield part, linear(x[part], W, bias, scratch[: part.stop - part.start], scratch_bytes)


def linear(x: Tensor, W: Tensor, bias: Tensor | None, out: Tensor, scratch_bytes: int) -> Tensor:
    """`x @ W.T + bias` into `out` [n, F], computed in its dtype."""
    wide = out.dtype
    x = x.to(wide)
    # Rows of W are widened a block at a time: a copy of all of them may be larger than the scratch.
    size = len(W) if wide == W.dtype else scratch_bytes // max(1, W.shape[1] * wide.itemsize)
    for block in chunks(len(W), 1, size):
        rows = W[block].to(wide).T
        if bias is None:
            torch.mm(x, rows, out=out[:, block])
        else:
            torch.addmm(bias[block].to(wide), x, rows, out=out[:, block])
    return out


def top_k(scores: Tensor, k: int, zeros_free: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest of each row [n, F], descending, ties to the lowest index, NaN largest: values, indices [n, k].

    Equivalent to the first k columns of `scores.sort(dim=1, descending=True, stable=True)`. `zeros_free`: which of
    several zeros is taken does not matter.

    `torch.topk` promises no order among equals. With one more element than asked for, a row without equal
    neighbours is exact as it stands; the few others are selected again.
    """
    values, indices = scores.topk(min(k + 1, scores.shape[1]))
    equal = values[:, 1:] == values[:, :-1]
    if zeros_free:
        equal &= values[:, 1:] != 0
    again = (equal.any(1) | values[:, :1].isnan().any(1)).nonzero().flatten()
    values, indices = values[:, :k], indices[:, :k]
    if len(again):
        rows = scores.index_select(0, again)
        last = values.index_select(0, again)[:, -1:]
        better = (rows > last) | (rows.isnan() & ~last.isnan())
        equal = (rows == last) | (rows.isnan() & last.isnan())
        free = k - better.sum(1, keepdim=True)
        chosen = (better | (equal & (equal.cumsum(1) <= free))).nonzero()[:, 1].view(-1, k)  # k a row, ascending
        picked, order = rows.gather(1, chosen).sort(dim=1, descending=True, stable=True)
        values = values.index_copy(0, again, picked)
        indices = indices.index_copy(0, again, chosen.gather(1, order))
    return values, indices


def group_starts(F: int, k: int) -> list[int]:
    """Where each of k groups of neighbouring latents begins, and the end: sizes differ by one at most."""
    return [g * F // k for g in range(k + 1)]


def group_max(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each of k groups of columns, descending, ties to the lowest index: values, indices [n, k]."""
    F = pre.shape[1]
    starts = torch.tensor(group_starts(F, k), device=pre.device)
    if F % k == 0:
        groups = pre.unflatten(1, (k, F // k))
    else:  # the shorter groups name their last latent twice
        columns = starts[:-1, None] + torch.arange(F // k + 1, device=pre.device)
        groups = pre[:, torch.minimum(columns, starts[1:, None] - 1)]
    best = groups.max(2)
    values, order = best.values.sort(dim=1, descending=True, stable=True)
    return values, (best.indices + starts[:-1]).gather(1, order)


def select(pre: Tensor, k: int, activation: str) -> tuple[Tensor, Tensor]:
    """Values and indices [n, k] of the latents that an activation keeps. Overwrites `pre` [n, F]."""
    if activation == "abstopk":
        _, indices = top_k(pre.abs(), k)
        return pre.gather(1, indices), indices
    return group_max(pre.relu_(), k) if activation == "groupmax" else top_k(pre.relu_(), k)


def encode(
    x: Tensor,
    W_enc: Tensor,
    bias: Tensor | None,
    k: int,
    activation: str,
    scratch_bytes: int,
    adjust: Adjust | None = None,
) -> tuple[Tensor, Tensor]:
    """Selected latents of all tokens: values [N, k] and indices [N, k] int64.

    `adjust` finishes the pre-activations of a chunk: `x @ W_enc.T + bias`, in place.
    """
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for part, pre in linear_chunks(x, W_enc, bias, scratch_bytes, buffers=1 if activation == "topk" else 2):
        if adjust is not None:
            adjust(pre, part)
        values[part], indices[part] = select(pre, k, activation)
    return values, indices


def encoder_gradients(
    grad: Tensor,
    grad_linear: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    needed: list[bool],
    sums: RowSums = TORCH,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [N, D], W_enc [F, D] and b_enc [F], from those of the selected latents [N, K].

    `grad` is that of the pre-activations, `grad_linear` that of `x @ W_enc.T` (they differ by a scale).
    """
    dx = dW = db = None
    if needed[0]:
        dx = sums.gather_sum(grad_linear, indices, W_enc)
    if needed[1] or needed[2]:
        by_latent = sums.transpose(indices, len(W_enc))
        if needed[1]:
            dW = sums.transposed_gather_sum(grad_linear, by_latent, x)
        if needed[2]:
            db = sums.transposed_sum(grad, by_latent)
    return dx, dW, db
