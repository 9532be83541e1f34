"""Products with gathered rows, for code that works on sparse latents and connections outside an op.

A bag is a token with its active latents, or a latent with its connections: `weights` and `indices` [N, K] name K of
the rows of a `table` [R, D]. An index of -1 is an empty slot: zero in every sum, and zero as a result. The products
are not differentiable; their sums have a fixed order, so that the same numbers give the same bits on every run.
`backend` is chosen as in the ops, from the tensor that is read by rows; "reference" stands for "torch" here.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import Tensor

from sparseclt.ops import _torch_rows
from sparseclt.ops._torch_rows import Transpose, accumulation_dtype, add_at_, chunks, section, transpose
from sparseclt.ops.backend import choose

__all__ = [
    "Transpose",
    "accumulation_dtype",
    "add_at_",
    "chunks",
    "gather_sum",
    "row_dots",
    "section",
    "transpose",
    "transposed_gather_sum",
]


def gather_sum(weights: Tensor, indices: Tensor, table: Tensor, *, backend: str | None = None) -> Tensor:
    """[N, D]: each bag's weighted sum of the rows that it names.

    Equivalent to `scatter(weights) @ table`, scatter(weights) [N, R]. `weights` `indices` [N, K], `table` [R, D].
    """
    return _products("gather_sum", backend, table).gather_sum(weights, indices, table)


def row_dots(bags: Tensor, indices: Tensor, table: Tensor, *, backend: str | None = None) -> Tensor:
    """[N, K]: the dot product of each bag's own vector with each row that it names.

    Equivalent to `(bags @ table.T).gather(1, indices)`. `bags` [N, D], `indices` [N, K], `table` [R, D].
    """
    return _products("row_dots", backend, table).row_dots(bags, indices, table)


def transposed_gather_sum(
    weights: Tensor, transposed: Transpose, bags: Tensor, *, backend: str | None = None
) -> Tensor:
    """[R, D]: for each row, the weighted sum of the vectors of the bags that name it.

    Equivalent to `scatter(weights).T @ bags`, scatter(weights) [N, R]. `weights` [N, K], `bags` [N, D], `transposed`:
    the order of the indices [N, K] by row, from `transpose(indices, R)`, or a `section` of it.
    """
    return _products("transposed_gather_sum", backend, bags).transposed_gather_sum(weights, *transposed, bags)


class _Products(NamedTuple):
    gather_sum: Callable[[Tensor, Tensor, Tensor], Tensor]
    row_dots: Callable[[Tensor, Tensor, Tensor], Tensor]
    transposed_gather_sum: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _products(name: str, backend: str | None, tensor: Tensor) -> _Products:
    return _of_backend(choose(name, backend, tensor))


@cache
def _of_backend(backend: str) -> _Products:
    if backend == "numba":
        from sparseclt.ops import _numba as numba

        return _Products(numba.gather_sum, numba.row_dots, numba.transposed_gather_sum)
    if backend == "triton":
        from csrc_triton.rows import gather_sum, row_dots, transposed_gather_sum

        return _Products(gather_sum, row_dots, transposed_gather_sum)
    return _Products(_torch_rows.gather_sum, _torch_rows.row_dots, _torch_rows.transposed_gather_sum)
