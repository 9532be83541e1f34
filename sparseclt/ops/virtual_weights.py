"""How strongly each upstream latent writes what a downstream latent reads, for the kept connections only."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._rows import gather_sum, row_dots, transposed_gather_sum
from sparseclt.ops.backend import implements, lookup
from sparseclt.ops.checks import check_device, check_shapes, check_tensors
from sparseclt.ops.connections import Connections, as_connections


def virtual_weights(
    W_enc: Tensor, E: Tensor, connections: Tensor | Connections, *, backend: str | None = None
) -> Tensor:
    """Virtual weights of the kept connections: V [F, C], 0 at empty slots.

    Equivalent to `(W_enc @ E.T).gather(1, connections)`.

    `W_enc` [F, D] downstream encoder, `E` [U, D] effective decoders of the upstream latents, `connections`
    [F, C] ids in 0..U-1 or -1: a tensor or a `Connections`.
    Raises ValueError (shapes, ids out of range, devices, backend), TypeError (dtypes).
    """
    check_tensors(W_enc=W_enc, E=E)
    sizes = check_shapes(W_enc=(W_enc, "F D"), E=(E, "U D"))
    if isinstance(connections, Connections) and connections.upstream != sizes["U"]:
        raise ValueError(f"E: expected {connections.upstream} rows, as in connections, got {sizes['U']}")
    connections = as_connections(connections, sizes["U"])
    check_shapes(W_enc=(W_enc, "F D"), connections=(connections.indices, "F C"))
    check_device("connections", connections.indices, "W_enc", W_enc)
    return lookup("virtual_weights", backend)(W_enc, E, connections)


@implements("virtual_weights", "reference")
def virtual_weights_reference(W_enc: Tensor, E: Tensor, connections: Connections) -> Tensor:
    slots = torch.where(connections.indices < 0, connections.upstream, connections.indices).long()
    return torch.cat([W_enc @ E.T, W_enc.new_zeros(len(W_enc), 1)], 1).gather(1, slots)


@implements("virtual_weights", "torch")
def virtual_weights_torch(W_enc: Tensor, E: Tensor, connections: Connections) -> Tensor:
    return _VirtualWeights.apply(W_enc, E, connections)


class _VirtualWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W_enc: Tensor, E: Tensor, connections: Connections) -> Tensor:
        ctx.save_for_backward(W_enc, E)
        ctx.connections = connections
        return row_dots(W_enc, connections.indices, E)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_enc, E = ctx.saved_tensors
        dW = dE = None
        if ctx.needs_input_grad[0]:
            dW = gather_sum(grad, ctx.connections.indices, E)
        if ctx.needs_input_grad[1]:
            dE = transposed_gather_sum(grad, ctx.connections.transposed, W_enc)
        return dW, dE, None
