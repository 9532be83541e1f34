"""Decoder rows of the active latents, added up."""

from torch import Tensor

from sparseclt.ops._torch_rows import dense, gather_sum, row_dots, transpose, transposed_gather_sum
from sparseclt.ops.backend import choose
from sparseclt.ops.checks import check_device, check_ids, check_indices, check_shapes, check_tensors, shape_like
from sparseclt.ops.registration import Implementation, Operator


def sparse_decode(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Weighted sum of the decoder rows of the active latents: [N, D], or [N, T, D] for T targets.

    Equivalent to `scatter(values) @ W_dec + b_dec`, scatter(values) [N, F]; one gather serves all targets.
    Differentiable in `values`, `W_dec` and `b_dec`. In fp16 and bf16, sums are accumulated in fp32 and rounded once.

    `values` [N, K]; `indices` [N, K], int32 or int64, in any order, duplicates add up, -1 is an empty slot;
    `W_dec` [F, D] with `b_dec` [D] or None, or `W_dec` [F, T, D] with `b_dec` [T, D] or None. `backend` as in
    `topk_encode`.
    Raises ValueError (shapes, ids out of range: checked on the CPU only, devices, backend), TypeError (dtypes),
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
    if backend == "reference":
        rows = sparse_decode_reference(values, indices, W_dec.flatten(1))
    else:
        rows = OPERATOR(values, indices, W_dec.flatten(1), backend)
    result: Tensor = rows.view(len(rows), *W_dec.shape[1:])
    return result if b_dec is None else result + b_dec


def check_latents(values: Tensor, indices: Tensor, W_dec: Tensor) -> None:
    check_ids("indices", indices, len(W_dec), "latents of W_dec")


def sparse_decode_reference(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    check_latents(values, indices, W_dec)
    return dense(values, indices, len(W_dec)) @ W_dec


def backward_torch(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of values [N, K] and W_dec [F, D] from that of the result [N, D]."""
    d_values = row_dots(grad, indices, W_dec) if needed[0] else None
    dW = transposed_gather_sum(values, *transpose(indices, len(W_dec)), grad) if needed[1] else None
    return d_values, dW


def fake(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return values.new_empty(len(values), W_dec.shape[1])


def _torch() -> Implementation:
    return Implementation(gather_sum, backward_torch)


def _numba() -> Implementation:
    from sparseclt.ops import _numba as numba

    return Implementation(numba.gather_sum, numba.sparse_decode_backward)


def _triton() -> Implementation:
    from csrc_triton.sparse_decode import backward, forward

    return Implementation(forward, backward)


OPERATOR = Operator(
    "sparse_decode(Tensor values, Tensor indices, Tensor W_dec, str backend) -> Tensor",
    {"torch": _torch, "numba": _numba, "triton": _triton},
    fake,
    check=check_latents,
    backward="grad, values, indices, W_dec, needed -> values, W_dec",
)
