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
from sparseclt.ops._torch_rows import PAIR_BYTES, Transpose, accumulation_dtype, add_at_, chunks
from sparseclt.ops.backend import INSTALLED, choose
from sparseclt.ops.scratch import default_scratch

__all__ = [
    "PAIR_BYTES",
    "Transpose",
    "accumulation_dtype",
    "add_at_",
    "add_outer_products_",
    "chunks",
    "gather_sum",
    "row_dots",
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
    the order of the indices [N, K] by row, from `transpose(indices, R)`, or that of some of the rows.
    """
    return _products("transposed_gather_sum", backend, bags).transposed_gather_sum(weights, *transposed, bags)


def transpose(indices: Tensor, rows: int) -> Transpose:
    """The slots of `indices` [N, K] sorted by the row of 0..rows-1 that they name; the same on every backend."""
    if indices.device.type == "cpu" and "numba" in INSTALLED:
        return _of_backend("numba").transpose(indices, rows)
    return _torch_rows.transpose(indices, rows)


def add_outer_products_(
    total: Tensor, weights: Tensor, rows: Tensor, values: Tensor, ids: Tensor, *, backend: str | None = None
) -> None:
    """Add to `total` [R, U], in place and one bag after another, the outer product of two sparse vectors of each bag.

    Equivalent to `total += scatter(weights).T @ scatter(values)`, scatter(weights) [N, R], scatter(values) [N, U].
    `weights` `rows` [N, K], `values` `ids` [N, S], `total` contiguous. Only pairs of slots are met, and they take the
    scratch of a backend at most.
    """
    backend = choose("add_outer_products_", backend, total)
    scratch = default_scratch("add_outer_products_", backend, total.device)
    _of_backend(backend).add_outer_products_(total, weights, rows, values, ids, scratch)


class _Products(NamedTuple):
    gather_sum: Callable[[Tensor, Tensor, Tensor], Tensor]
    row_dots: Callable[[Tensor, Tensor, Tensor], Tensor]
    transposed_gather_sum: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    transpose: Callable[[Tensor, int], Transpose] = _torch_rows.transpose
    add_outer_products_: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int], None] = _torch_rows.add_outer_products_


def _products(name: str, backend: str | None, tensor: Tensor) -> _Products:
    return _of_backend(choose(name, backend, tensor))


@cache
def _of_backend(backend: str) -> _Products:
    if backend == "numba":
        from sparseclt.ops import _numba as numba

        return _Products(
            numba.gather_sum, numba.row_dots, numba.transposed_gather_sum, numba.transpose, numba.add_outer_products_
        )
    if backend == "triton":
        from csrc_triton.rows import gather_sum, row_dots, transposed_gather_sum

        return _Products(gather_sum, row_dots, transposed_gather_sum)
    return _Products(_torch_rows.gather_sum, _torch_rows.row_dots, _torch_rows.transposed_gather_sum)
