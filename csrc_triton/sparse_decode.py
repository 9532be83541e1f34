"""Weighted sums of the active latents' decoder rows; one gather serves all target layers.

forward:  out[n] = sum_k values[n, k] W_dec[indices[n, k]]
backward: d_values[n, k] = <grad[n], W_dec[indices[n, k]]>, and dW[f] sums value x grad over the tokens in which f is
          active, in the order of the transposed slots

The kernels are those of rows.py.
"""

from collections.abc import Sequence

from torch import Tensor

from .launch import launcher
from .rows import gather_sum, row_dots, transposed_gather_sum
from .transpose import transpose


@launcher
def forward(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """[N, D] from `values` and `indices` [N, K] and `W_dec` [F, D], any strides (D may be all targets side by side).

    Equivalent to `scatter(values) @ W_dec`. Rows of W_dec should be contiguous: in the transpose view of a [D, F]
    matrix every number costs a memory sector of its own.
    """
    return gather_sum(values, indices, W_dec)


@launcher
def backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """d_values [N, K] (0 in empty slots) and dW [F, D] from `grad` [N, D]; None where not `needed`."""
    d_values = row_dots(grad, indices, W_dec) if needed[0] else None
    dW = transposed_gather_sum(values, *transpose(indices, len(W_dec)), grad) if needed[1] else None
    return d_values, dW
