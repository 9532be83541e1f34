"""How strongly each upstream latent writes what a downstream latent reads, for the kept connections only.

forward:  V[f, c] = <W_enc[f], E[connections[f, c]]>, a sampled dense-dense product
backward: dW[f] = sum_c grad[f, c] E[connections[f, c]], and dE[u] sums grad x W_enc over the latents that read u.
"""

from torch import Tensor

from .launch import launcher
from .rows import gather_sum, row_dots, transposed_gather_sum


@launcher
def forward(W_enc: Tensor, E: Tensor, connections: Tensor) -> Tensor:
    """V [F, C] from `W_enc` [F, D], `E` [U, D] and `connections` [F, C], 0 at empty slots (-1).

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
    needs: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """dW [F, D] and dE [U, D], those that `needs` asks for; `order` and `starts`: `transpose(connections, U)`."""
    dW = gather_sum(grad, connections, E) if needs[0] else None
    dE = transposed_gather_sum(grad, order, starts, W_enc) if needs[1] else None
    return dW, dE
