"""Decoder rows of the active latents, added up; one gather serves all target layers.

forward:  out[n] = sum_k values[n, k] W_dec[indices[n, k]]
backward: d_values[n, k] = <grad[n], W_dec[indices[n, k]]>, and dW[f] sums value x grad over the tokens that
          have f active, in the order of the transposed slots.
"""

from torch import Tensor

from .launch import launcher
from .rows import gather_sum, row_dots, transposed_gather_sum
from .transpose import transpose


@launcher
def forward(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """[N, D] from `values` `indices` [N, K] and `W_dec` [F, D], of any strides (D may be all targets side by side).

    Equivalent to `scatter(values) @ W_dec`. Rows of W_dec should be contiguous: through the transpose view of a
    [D, F] matrix every number costs a memory sector of its own.
    """
    return gather_sum(values, indices, W_dec)


@launcher
def backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, needs: tuple[bool, bool] = (True, True)
) -> tuple[Tensor | None, Tensor | None]:
    """d_values [N, K] (0 at empty slots) and dW [F, D], those that `needs` asks for."""
    d_values = row_dots(grad, indices, W_dec) if needs[0] else None
    dW = transposed_gather_sum(values, *transpose(indices, len(W_dec)), grad) if needs[1] else None
    return d_values, dW
