"""Decoder rows of the active latents, added up."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._rows import dense, gather_sum, row_dots, transpose, transposed_gather_sum
from sparseclt.ops.backend import implements, lookup
from sparseclt.ops.checks import check_device, check_indices, check_range, check_shapes, check_tensors, shape_like


def sparse_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Weighted sum of the decoder rows of the active latents: [N, D], or [N, T, D] for T targets.

    Equivalent to `scatter(values) @ W_dec + b_dec`, scatter(values) [N, F]; one gather serves all targets.

    `values` [N, K]; `indices` [N, K], int32 or int64, in any order, duplicates add up, -1 is an empty slot;
    `W_dec` [F, D] with `b_dec` [D] or None, or `W_dec` [F, T, D] with `b_dec` [T, D] or None.
    Raises ValueError (shapes, ids out of range: read on the CPU only, devices, backend), TypeError (dtypes).
    """
    check_tensors(values=values, W_dec=W_dec, b_dec=b_dec)
    check_indices("indices", indices)
    check_device("indices", indices, "values", values)
    letters = shape_like("W_dec", W_dec, "F D", "F T D")
    sizes = check_shapes(
        values=(values, "N K"),
        indices=(indices, "N K"),
        W_dec=(W_dec, letters),
        b_dec=(b_dec, letters.removeprefix("F ")),
    )
    if indices.device.type == "cpu":
        check_range("indices", indices, sizes["F"], "latents of W_dec")
    rows = lookup("sparse_decode", backend)(values, indices, W_dec.flatten(1))
    result = rows.view(len(rows), *W_dec.shape[1:])
    return result if b_dec is None else result + b_dec


@implements("sparse_decode", "reference")
def sparse_decode_reference(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return dense(values, indices, len(W_dec)) @ W_dec


@implements("sparse_decode", "torch")
def sparse_decode_torch(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return _SparseDecode.apply(values, indices, W_dec)


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return gather_sum(values, indices, W_dec)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, indices, W_dec = ctx.saved_tensors
        d_values = dW = None
        if ctx.needs_input_grad[0]:
            d_values = row_dots(grad, indices, W_dec)
        if ctx.needs_input_grad[2]:
            dW = transposed_gather_sum(values, transpose(indices, len(W_dec)), grad)
        return d_values, None, dW
