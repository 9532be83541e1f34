"""How strongly each upstream latent writes what a downstream latent reads, for the kept connections only."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._registration import define, fake_gradients, if_needed, present
from sparseclt.ops._rows import TORCH, RowSums, Transpose, row_dots
from sparseclt.ops.backend import choose, implementation, register
from sparseclt.ops.checks import check_device, check_shapes, check_tensors
from sparseclt.ops.connections import Connections, as_connections, csc


def virtual_weights(
    W_enc: Tensor, E: Tensor, connections: Tensor | Connections, *, backend: str | None = None
) -> Tensor:
    """Virtual weights of the kept connections: V [F, C], 0 at empty slots.

    Equivalent to `(W_enc @ E.T).gather(1, connections)`.

    `W_enc` [F, D] downstream encoder, `E` [U, D] effective decoders of the upstream latents, `connections`
    [F, C] ids in 0..U-1 or -1, distinct in a row: a tensor or a `Connections`.
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
    order, starts = csc(connections, "virtual_weights", backend, E)
    return _virtual_weights(W_enc, E, connections.indices, order, starts, backend)


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
    dE = sums.transposed_gather_sum(grad, Transpose(order, starts), W_enc) if needed[1] else None
    return dW, dE


register("virtual_weights", "reference", virtual_weights_reference)
register("virtual_weights", "torch", forward_torch, partial(backward_by, TORCH))


def _run(
    W_enc: Tensor, E: Tensor, connections: Tensor, order: Tensor | None, starts: Tensor | None, backend: str
) -> Tensor:
    return implementation("virtual_weights", backend).forward(W_enc, E, connections)


def _fake(W_enc: Tensor, E: Tensor, connections: Tensor, *_: Any) -> Tensor:
    return W_enc.new_empty(connections.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:2])
    grads = _backward(grad, *ctx.saved_tensors, needed, ctx.backend)
    return *if_needed(needed, grads), None, None, None, None


def _run_backward(
    grad: Tensor,
    W_enc: Tensor,
    E: Tensor,
    connections: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    needed: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    run = implementation("virtual_weights", backend).gradients
    return present(*run(grad, W_enc, E, connections, order, starts, needed))


def _fake_backward(grad: Tensor, W_enc: Tensor, E: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return fake_gradients(rest[-2], W_enc, E)


_backward = define(
    "virtual_weights_backward(Tensor grad, Tensor W_enc, Tensor E, Tensor connections, Tensor? order, Tensor? starts,"
    " bool[] needed, str backend) -> (Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)
_virtual_weights = define(
    "virtual_weights(Tensor W_enc, Tensor E, Tensor connections, Tensor? order, Tensor? starts, str backend) -> Tensor",
    _run,
    _fake,
    _differentiate,
    _save,
)
