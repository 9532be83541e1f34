"""How strongly each upstream latent writes in the direction that a downstream latent reads, for kept connections."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._torch_rows import TORCH, RowSums, row_dots
from sparseclt.ops.backend import choose
from sparseclt.ops.checks import check_device, check_shapes, check_tensors
from sparseclt.ops.connections import Connections, as_connections, csc
from sparseclt.ops.registration import Implementation, Operator


def virtual_weights(
    W_enc: Tensor, E: Tensor, connections: Tensor | Connections, *, backend: str | None = None
) -> Tensor:
    """Virtual weights of the kept connections: V [F, C], 0 at empty slots.

    Equivalent to `(W_enc @ E.T).gather(1, connections)`. Differentiable in `W_enc` and `E`.

    `W_enc` [F, D] downstream encoder; `E` [U, D] effective decoders of the upstream latents; `connections` [F, C] ids
    in 0..U-1 or -1, distinct within a row: a tensor or a `Connections`. `backend` as in `topk_encode`.
    Raises ValueError (shapes, ids out of range or twice in a row, devices, backend), TypeError (dtypes),
    ImportError (backend not installed).
    """
    check_tensors(W_enc=W_enc, E=E)
    sizes = check_shapes(W_enc=(W_enc, "F D"), E=(E, "U D"))
    if isinstance(connections, Connections) and connections.upstream != sizes["U"]:
        raise ValueError(f"E: expected {connections.upstream} rows, as in connections, got {sizes['U']}")
    connections = as_connections(connections, sizes["U"])
    check_shapes(W_enc=(W_enc, "F D"), connections=(connections.indices, "F C"))
    check_device("connections", connections.indices, "W_enc", W_enc)
    backend = choose("virtual_weights", backend, W_enc)
    if backend == "reference":
        return virtual_weights_reference(W_enc, E, connections)
    order, starts = csc(connections, OPERATOR, backend, E)
    V: Tensor = OPERATOR(W_enc, E, connections.indices, order, starts, backend)
    return V


def virtual_weights_reference(W_enc: Tensor, E: Tensor, connections: Connections) -> Tensor:
    slots = torch.where(connections.indices < 0, connections.upstream, connections.indices).long()
    return torch.cat([W_enc @ E.T, W_enc.new_zeros(len(W_enc), 1)], 1).gather(1, slots)


def forward_torch(W_enc: Tensor, E: Tensor, connections: Tensor) -> Tensor:
    return row_dots(W_enc, connections, E)


def backward_by(
    sums: RowSums,
    grad: Tensor,
    W_enc: Tensor,
    E: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of W_enc [F, D] and E [U, D] from that of V [F, C]."""
    dW = sums.gather_sum(grad, connections, E) if needed[0] else None
    dE = sums.transposed_gather_sum(grad, order, starts, W_enc) if needed[1] else None
    return dW, dE


def fake(W_enc: Tensor, E: Tensor, connections: Tensor, *_: Any) -> Tensor:
    return W_enc.new_empty(connections.shape)


def _torch() -> Implementation:
    return Implementation(forward_torch, partial(backward_by, TORCH))


def _numba() -> Implementation:
    from sparseclt.ops import _numba as numba

    return Implementation(numba.virtual_weights, partial(backward_by, numba.SUMS))


def _triton() -> Implementation:
    from csrc_triton.virtual_weights import backward, forward

    return Implementation(forward, backward)


OPERATOR = Operator(
    "virtual_weights(Tensor W_enc, Tensor E, Tensor connections, Tensor? order, Tensor? starts, str backend) -> Tensor",
    {"torch": _torch, "numba": _numba, "triton": _triton},
    fake,
    forward="W_enc, E, connections",
    backward="grad, W_enc, E, connections, order, starts, needed -> W_enc, E",
)
