"""How strongly each upstream latent writes in the direction that a downstream latent reads, per kept connection.

forward:  V[f, c] = <W_enc[f], E[connections[f, c]]>, a sampled dense-dense product
backward: dW[f] = sum_c grad[f, c] E[connections[f, c]], and dE[u] sums grad x W_enc over the latents that read u

The kernels are those of rows.py.
"""

from collections.abc import Sequence

from torch import Tensor

from .launch import launcher
from .rows import gather_sum, row_dots, transposed_gather_sum


@launcher
def forward(W_enc: Tensor, E: Tensor, connections: Tensor) -> Tensor:
    """V [F, C] from `W_enc` [F, D], `E` [U, D] and `connections` [F, C]; 0 in empty slots (-1).

    Equivalent to `(W_enc @ E.T).gather(1, connections)`.
    """
    return row_dots(W_enc, connections, E)


@launcher
def backward(
    grad: Tensor,
    W_enc: Tensor,
    E: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """dW [F, D] and dE [U, D] from `grad` [F, C]; None where not `needed`.

    `order` and `starts`: `transpose(connections, U)`.
    """
    dW = gather_sum(grad, connections, E) if needed[0] else None
    dE = transposed_gather_sum(grad, order, starts, W_enc) if needed[1] else None
    return dW, dE
