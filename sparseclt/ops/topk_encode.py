"""The k largest pre-activations of an encoder, without ever keeping all of them."""

from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from sparseclt.ops._encode import encode, encoder_gradients, group_starts
from sparseclt.ops._registration import define, fake_gradients, if_needed, present
from sparseclt.ops._rows import TORCH, RowSums
from sparseclt.ops.backend import choose, implementation, register
from sparseclt.ops.checks import check_k, check_name, check_scratch, check_shapes, check_tensors

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
    """Exact top-k of an encoder: values [N, K] in descending order, indices [N, K] int64.

    With `pre = x @ W_enc.T + b_enc`, equivalent to
    - "topk": `relu(pre).topk(k)`;
    - "abstopk": `indices = pre.abs().topk(k).indices; pre.gather(1, indices)`, in descending order of size;
    - "groupmax": `relu(pre[:, g * F // k : (g + 1) * F // k].max(1))` for g = 0..k-1: the largest of each of k
      groups of neighbouring latents, in descending order.

    A slot whose value is zero has no gradient. Among equal pre-activations the lowest index is taken, on every
    backend (which of several zeros is free); NaN counts as the largest. In fp16 and bf16, pre-activations are
    accumulated and compared in fp32, values rounded once.

    `x` [N, D], `W_enc` [F, D], `b_enc` [F] or None: one floating-point dtype. `scratch_bytes` bounds the working
    memory (one token's pre-activations at least; None: what suits the backend).
    Raises ValueError (shapes, k outside 1..F, devices, activation, backend), TypeError (dtypes), ImportError
    (backend not installed).
    """
    check_encoder(x, W_enc, b_enc, k)
    check_name("activation", activation, ACTIVATIONS)
    backend = choose("topk_encode", backend, x)
    if backend == "reference":
        return topk_encode_reference(x, W_enc, b_enc, k, activation)
    values, indices = _topk_encode(x, W_enc, b_enc, k, activation, check_scratch(scratch_bytes, backend), backend)
    return values, indices


def check_encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int | None = None) -> None:
    check_tensors(x=x, W_enc=W_enc, b_enc=b_enc)
    sizes = check_shapes(x=(x, "N D"), W_enc=(W_enc, "F D"), b_enc=(b_enc, "F"))
    if k is not None:
        check_k(k, sizes["F"])


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """[N, F], for references."""
    return x @ W_enc.T if b_enc is None else x @ W_enc.T + b_enc


def topk_encode_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: Activation = "topk"
) -> tuple[Tensor, Tensor]:
    return select_reference(pre_activations(x, W_enc, b_enc), k, activation)


def select_reference(pre: Tensor, k: int, activation: Activation = "topk") -> tuple[Tensor, Tensor]:
    """A stable sort, because `torch.topk` promises no order among equals."""
    if activation == "groupmax":
        starts = group_starts(pre.shape[1], k)
        best = [pre[:, a:b].relu().max(1) for a, b in pairwise(starts)]
        indices = torch.stack([b.indices + first for b, first in zip(best, starts, strict=False)], 1)
        values, order = torch.stack([b.values for b in best], 1).sort(dim=1, descending=True, stable=True)
        return values, indices.gather(1, order)
    score = pre.abs() if activation == "abstopk" else pre.relu()
    indices = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (pre if activation == "abstopk" else score).gather(1, indices), indices


def topk_encode_torch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: str, scratch_bytes: int
) -> tuple[Tensor, Tensor]:
    return encode(x, W_enc, b_enc, k, activation, scratch_bytes)


def encode_backward_by(
    sums: RowSums,
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, W_enc and b_enc over the slots [N, K] with a value, -1 an empty one."""
    grad = grad_values.masked_fill(values == 0, 0)
    return encoder_gradients(grad, grad, indices, x, W_enc, needed, sums)


register("topk_encode", "reference", topk_encode_reference)
register("topk_encode", "torch", topk_encode_torch, partial(encode_backward_by, TORCH))


def _run(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: str, scratch_bytes: int, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation("topk_encode", backend).forward(x, W_enc, b_enc, k, activation, scratch_bytes)


def _fake(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(len(x), k), x.new_empty(len(x), k, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, *_, ctx.backend = inputs
    ctx.save_for_backward(*output, x, W_enc)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    grads = encode_backward(grad_values, *ctx.saved_tensors, needed, ctx.backend)
    return *if_needed(needed, grads), None, None, None, None


def _run_backward(
    grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, needed: list[bool], backend: str
) -> tuple[Tensor, ...]:
    run = implementation("topk_encode", backend).gradients
    return present(*run(grad_values, values, indices, x, W_enc, needed))


def _fake_backward(
    grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, needed: list[bool], backend: str
) -> tuple[Tensor, ...]:
    return fake_gradients(needed, x, W_enc, W_enc.new_empty(len(W_enc)))


encode_backward = define(
    "encode_backward(Tensor grad_values, Tensor values, Tensor indices, Tensor x, Tensor W_enc, bool[] needed,"
    " str backend) -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_topk_encode = define(
    "topk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k, str activation, SymInt scratch_bytes, str backend)"
    " -> (Tensor, Tensor)",
    _run,
    _fake,
    _differentiate,
    _save,
)
