"""Shared parts of the encoders: pre-activations of one chunk of tokens after another, exact selection, and gradients
over the selected latents.

Selection compares pre-activations in their accumulation dtype (fp32 for fp16 and bf16); values are rounded to the
input's dtype once, at the end.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparseclt.ops._torch_rows import RowSums, accumulation_dtype, chunks

Adjust = Callable[[Tensor, slice], None]  # changes a chunk of pre-activations in place


def linear_chunks(
    x: Tensor, W: Tensor, bias: Tensor | None, scratch_bytes: int, buffers: int = 1
) -> Iterator[tuple[slice, Tensor]]:
    """`x @ W.T + bias` [n, F] for consecutive chunks of tokens, in the accumulation dtype.

    x [N, D], W [F, D]. All chunks share one buffer, so that the next one overwrites the last: fresh memory costs more
    than the arithmetic. `buffers`: how many of that size must fit into the scratch.
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
    # Rows of W are widened block by block: a copy of all of them may be larger than the scratch.
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

    Equivalent to the first k columns of `scores.sort(dim=1, descending=True, stable=True)`. `zeros_free`: it does
    not matter which of several zeros is taken.

    `torch.topk` promises no order among equals. We ask for one element more than needed: a row without equal
    neighbours is then exact as it stands, and the few other rows are selected again.
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
        chosen = (better | (equal & (equal.cumsum(1) <= free))).nonzero()[:, 1].view(-1, k)  # k per row, ascending
        picked, order = rows.gather(1, chosen).sort(dim=1, descending=True, stable=True)
        values = values.index_copy(0, again, picked)
        indices = indices.index_copy(0, again, chosen.gather(1, order))
    return values, indices


def group_starts(F: int, k: int) -> list[int]:
    """Where each of k groups of neighbouring latents begins, and where the last ends. Sizes differ by at most one."""
    return [g * F // k for g in range(k + 1)]


def group_max(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The maximum of each of k groups of columns, descending, ties to the lowest index: values, indices [n, k]."""
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
    """Values and indices [n, k] of the latents that the activation keeps. Overwrites `pre` [n, F]."""
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

    `adjust` completes a chunk of `x @ W_enc.T + bias` in place.
    """
    values = x.new_empty(len(x), k)
    indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
    for part, pre in linear_chunks(x, W_enc, bias, scratch_bytes, buffers=1 if activation == "topk" else 2):
        if adjust is not None:
            adjust(pre, part)
        values[part], indices[part] = select(pre, k, activation)
    return values, indices


def encode_backward(
    sums: RowSums,
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [N, D], W_enc [F, D] and b_enc [F] over the slots [N, K] whose value is not zero."""
    grad = grad_values.masked_fill(values == 0, 0)
    return encoder_gradients(sums, grad, grad, indices, x, W_enc, needed)


def encoder_gradients(
    sums: RowSums,
    grad: Tensor,
    grad_linear: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [N, D], W_enc [F, D] and b_enc [F] from those of the selected latents [N, K].

    `grad` is the gradient of the pre-activations, `grad_linear` that of `x @ W_enc.T` (they differ by a scale).
    """
    dx = dW = db = None
    if needed[0]:
        dx = sums.gather_sum(grad_linear, indices, W_enc)
    if needed[1] or needed[2]:
        order, starts = sums.transpose(indices, len(W_enc))
        if needed[1]:
            dW = sums.transposed_gather_sum(grad_linear, order, starts, x)
        if needed[2]:
            db = sums.transposed_sum(grad, order, starts)
    return dx, dW, db


def norm_over_heads_(products: Iterator[Tensor]) -> Tensor:
    """`torch.stack(list(products)).norm(dim=0)` in the memory of the first product, the only one that must outlive
    the next."""
    total, following = next(products), next(products, None)
    if following is None:
        return total.abs_()
    total.square_()
    while following is not None:
        total += following.square_()
        following = next(products, None)
    return total.sqrt_()
