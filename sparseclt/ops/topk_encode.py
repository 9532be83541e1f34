"""The k largest pre-activations of an encoder, without ever holding all of them."""

from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from sparseclt.ops._encode import encode, encode_backward, group_starts
from sparseclt.ops._torch_rows import TORCH
from sparseclt.ops.backend import choose
from sparseclt.ops.checks import check_k, check_name, check_scratch, check_shapes, check_tensors, check_wide
from sparseclt.ops.registration import Implementation, Operator

Activation = Literal["topk", "abstopk", "groupmax"]
ACTIVATIONS = ("topk", "abstopk", "groupmax")


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    activation: Activation = "topk",
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact top-k of an encoder: values [N, K] in descending order and indices [N, K] int64, K = k.

    With `pre = x @ W_enc.T + b_enc`, equivalent to
    - "topk": `relu(pre).topk(k)`;
    - "abstopk": `indices = pre.abs().topk(k).indices; pre.gather(1, indices)`, in descending order of magnitude;
    - "groupmax": `relu(pre[:, g * F // k : (g + 1) * F // k].max(1))` for g = 0..k-1: the maximum of each of k groups
      of neighbouring latents, in descending order.

    Differentiable in `x`, `W_enc` and `b_enc`; a slot whose value is zero has no gradient. Every backend takes the
    lowest index among equal pre-activations (but any of several zeros), and NaN counts as the largest. In fp16 and
    bf16, pre-activations are accumulated and compared in fp32, and values are rounded once. TopK: Gao et al., "Scaling
    and evaluating sparse autoencoders" (2024).

    `x` [N, D], `W_enc` [F, D], `b_enc` [F] or None, all of one floating-point dtype, except that `b_enc` may be in fp32
    beside fp16 and bf16. `scratch_bytes` bounds the working memory in bytes (at least the pre-activations of one token;
    None: what suits the backend). `backend`: a name from `backends()`, or None for the fastest that is installed and
    takes the tensors.
    Raises ValueError (shapes, k outside 1..F, devices, activation, backend), TypeError (dtypes), ImportError
    (backend not installed).
    """
    check_encoder(x, W_enc, b_enc, k)
    check_name("activation", activation, ACTIVATIONS)
    backend = choose("topk_encode", backend, x)
    if backend == "reference":
        return topk_encode_reference(x, W_enc, b_enc, k, activation)
    scratch = check_scratch(scratch_bytes, "topk_encode", backend)
    values, indices = OPERATOR(x, W_enc, b_enc, k, activation, scratch, backend)
    return values, indices


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int | None = None) -> None:
    check_tensors(x=x, W_enc=W_enc)
    check_wide("b_enc", b_enc, "x", x)
    sizes = check_shapes(x=(x, "N D"), W_enc=(W_enc, "F D"), b_enc=(b_enc, "F"))
    if k is not None:
        check_k(k, sizes["F"])


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """[N, F], for references."""
    return x @ W_enc.T if b_enc is None else (x @ W_enc.T + b_enc).to(x.dtype)


def topk_encode_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: Activation = "topk"
) -> tuple[Tensor, Tensor]:
    return select_reference(pre_activations(x, W_enc, b_enc), k, activation)


def select_reference(pre: Tensor, k: int, activation: Activation = "topk") -> tuple[Tensor, Tensor]:
    """Sorts stably, because `torch.topk` promises no order among equals."""
    if activation == "groupmax":
        starts = group_starts(pre.shape[1], k)
        best = [pre[:, a:b].relu().max(1) for a, b in pairwise(starts)]
        indices = torch.stack([b.indices + first for b, first in zip(best, starts, strict=False)], 1)
        values, order = torch.stack([b.values for b in best], 1).sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, order)
    score = pre.abs() if activation == "abstopk" else pre.relu()
    indices = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (pre if activation == "abstopk" else score).gather(1, indices), indices


def fake(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)


def _torch() -> Implementation:
    return Implementation(encode, partial(encode_backward, TORCH))


def _numba() -> Implementation:
    from sparseclt.ops import _numba as numba

    return Implementation(numba.topk_encode, partial(encode_backward, numba.SUMS))


def _triton() -> Implementation:
    from csrc_triton.topk_encode import backward, forward

    return Implementation(forward, backward)


OPERATOR = Operator(
    "topk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k, str activation, SymInt scratch_bytes, str backend)"
    " -> (Tensor values, Tensor indices)",
    {"torch": _torch, "numba": _numba, "triton": _triton},
    fake,
    backward="grad_values, values, indices, x, W_enc, needed -> x, W_enc, b_enc",
    vectors={"b_enc": "W_enc"},
)
