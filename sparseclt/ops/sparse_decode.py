"""Decoder rows of the active latents, added up."""

from typing import Any

from torch import Tensor

from sparseclt.ops._registration import define, fake_gradients, if_needed, present
from sparseclt.ops._rows import dense, gather_sum, row_dots, transpose, transposed_gather_sum
from sparseclt.ops.backend import choose, implementation, register
from sparseclt.ops.checks import check_device, check_ids, check_indices, check_shapes, check_tensors, shape_like


def sparse_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Weighted sum of the decoder rows of the active latents: [N, D], or [N, T, D] for T targets.

    Equivalent to `scatter(values) @ W_dec + b_dec`, scatter(values) [N, F]; one gather serves all targets.

    `values` [N, K]; `indices` [N, K], int32 or int64, in any order, duplicates add up, -1 is an empty slot;
    `W_dec` [F, D] with `b_dec` [D] or None, or `W_dec` [F, T, D] with `b_dec` [T, D] or None.
    Raises ValueError (shapes, ids out of range: read on the CPU only, devices, backend), TypeError (dtypes),
    ImportError (backend not installed).
    """
    check_tensors(values=values, W_dec=W_dec, b_dec=b_dec)
    check_indices("indices", indices)
    check_device("indices", indices, "values", values)
    letters = shape_like("W_dec", W_dec, "F D", "F T D")
    check_shapes(
        values=(values, "N K"),
        indices=(indices, "N K"),
        W_dec=(W_dec, letters),
        b_dec=(b_dec, letters.removeprefix("F ")),
    )
    backend = choose("sparse_decode", backend, values)
    run = sparse_decode_reference if backend == "reference" else _sparse_decode
    rows = run(values, indices, W_dec.flatten(1), backend)
    result = rows.view(len(rows), *W_dec.shape[1:])
    return result if b_dec is None else result + b_dec


def sparse_decode_reference(values: Tensor, indices: Tensor, W_dec: Tensor, backend: str = "reference") -> Tensor:
    check_ids("indices", indices, len(W_dec), "latents of W_dec")
    return dense(values, indices, len(W_dec)) @ W_dec


def backward_torch(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of values [N, K] and W_dec [F, D] from that of the result [N, D]."""
    d_values = row_dots(grad, indices, W_dec) if needed[0] else None
    dW = transposed_gather_sum(values, transpose(indices, len(W_dec)), grad) if needed[1] else None
    return d_values, dW


register("sparse_decode", "reference", sparse_decode_reference)
register("sparse_decode", "torch", gather_sum, backward_torch)
register("transposed_gather_sum", "torch", transposed_gather_sum)


def _run(values: Tensor, indices: Tensor, W_dec: Tensor, backend: str) -> Tensor:
    check_ids("indices", indices, len(W_dec), "latents of W_dec")
    return implementation("sparse_decode", backend).forward(values, indices, W_dec)


def _fake(values: Tensor, indices: Tensor, W_dec: Tensor, backend: str) -> Tensor:
    return values.new_empty(len(values), W_dec.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[2]]
    d_values, dW = if_needed(needed, _backward(grad, *ctx.saved_tensors, needed, ctx.backend))
    return d_values, None, dW, None


def _run_backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, needed: list[bool], backend: str
) -> tuple[Tensor, ...]:
    return present(*implementation("sparse_decode", backend).gradients(grad, values, indices, W_dec, needed))


def _fake_backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, needed: list[bool], backend: str
) -> tuple[Tensor, ...]:
    return fake_gradients(needed, values, W_dec)


_backward = define(
    "sparse_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor W_dec, bool[] needed, str backend)"
    " -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_sparse_decode = define(
    "sparse_decode(Tensor values, Tensor indices, Tensor W_dec, str backend) -> Tensor",
    _run,
    _fake,
    _differentiate,
    _save,
)
