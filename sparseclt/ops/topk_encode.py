"""The k largest pre-activations of an encoder, without ever keeping all of them."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._rows import SCRATCH_BYTES, chunks, gather_sum, transpose, transposed_gather_sum
from sparseclt.ops.backend import implements, lookup
from sparseclt.ops.checks import check_k, check_shapes, check_tensors


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    backend: str | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    """Exact top-k of an encoder: values [N, K] in descending order, indices [N, K] int64.

    Equivalent to `relu(x @ W_enc.T + b_enc).topk(k)`. A slot whose value is zero has no gradient. Among equal
    pre-activations the choice is free.

    `x` [N, D], `W_enc` [F, D], `b_enc` [F] or None: one floating-point dtype. `scratch_bytes` bounds the
    pre-activations alive at a time (one token's at least).
    Raises ValueError (shapes, k outside 1..F, devices, backend), TypeError (dtypes).
    """
    check_tensors(x=x, W_enc=W_enc, b_enc=b_enc)
    check_k(k, check_shapes(x=(x, "N D"), W_enc=(W_enc, "F D"), b_enc=(b_enc, "F"))["F"])
    return lookup("topk_encode", backend)(x, W_enc, b_enc, k, scratch_bytes)


@implements("topk_encode", "reference")
def topk_encode_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int = 0
) -> tuple[Tensor, Tensor]:
    pre = x @ W_enc.T if b_enc is None else x @ W_enc.T + b_enc
    values, indices = pre.relu().topk(k)
    return values, indices


@implements("topk_encode", "torch")
def topk_encode_torch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int
) -> tuple[Tensor, Tensor]:
    return _TopkEncode.apply(x, W_enc, b_enc, k, scratch_bytes)


class _TopkEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int
    ) -> tuple[Tensor, Tensor]:
        values = x.new_empty(len(x), k)
        indices = torch.empty(len(x), k, dtype=torch.int64, device=x.device)
        scratch = x.new_empty(0)
        for part in chunks(len(x), len(W_enc) * x.element_size(), scratch_bytes):
            if part.start == 0:
                scratch = x.new_empty(part.stop, len(W_enc))
            pre = scratch[: part.stop - part.start]
            if b_enc is None:
                torch.mm(x[part], W_enc.T, out=pre)
            else:
                torch.addmm(b_enc, x[part], W_enc.T, out=pre)
            values[part], indices[part] = pre.relu_().topk(k)
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices = ctx.saved_tensors
        grad = grad_values * (values > 0)
        return *encoder_gradients(grad, grad, indices, x, W_enc, ctx.needs_input_grad), None, None


def encoder_gradients(
    grad: Tensor, grad_linear: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [N, D], W_enc [F, D] and b_enc [F], from those of the selected latents [N, K].

    `grad` is that of the pre-activations, `grad_linear` that of `x @ W_enc.T` (they differ by a scale).
    """
    dx = dW = db = None
    if needed[0]:
        dx = gather_sum(grad_linear, indices, W_enc)
    if needed[1] or needed[2]:
        by_latent = transpose(indices, len(W_enc))
        if needed[1]:
            dW = transposed_gather_sum(grad_linear, by_latent, x)
        if needed[2]:
            db = transposed_gather_sum(grad, by_latent, x.new_ones(len(x), 1)).flatten()
    return dx, dW, db
