"""Tensors that only the first rank of a group has, on all of its ranks."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparseclt.parallel.group import Group


def from_first(
    group: Group, device: torch.device, own: list[Tensor] | None, note: Any = None, behind: Sequence[Tensor] = ()
) -> tuple[Any, list[Tensor]]:
    """The note and the tensors of the first rank, on all ranks. Differentiable: the ranks' gradients are added up on
    the first.

    `own`: the tensors, on the first rank; None on the others. `behind`: on the others, tensors that were made before,
    from which those of the first rank follow there: a backward pass goes on to them, with gradients of zero.
    """
    if group.alone:
        return note, own or []
    header: list[Any] = [None]
    if own is not None:
        header = [(note, [(tuple(t.shape), t.dtype, t.requires_grad) for t in own])]
    dist.broadcast_object_list(header, group.source, group=group.process_group, device=device)
    note, forms = header[0]
    tensors = own or [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, _ in forms]
    for tensor in tensors:
        group.broadcast_(tensor.detach().contiguous() if own is not None else tensor)
    traced = [i for i, (_, _, differentiable) in enumerate(forms) if differentiable]
    if traced:
        sources = [tensors[i] for i in traced] if own is not None else [torch.zeros((), requires_grad=True), *behind]
        found = _FromFirst.apply(group, [tensors[i].detach() for i in traced], own is not None, *sources)
        for i, tensor in zip(traced, found, strict=True):
            tensors[i] = tensor
    return note, tensors


class _FromFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, found: list[Tensor], first: bool, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.first = group, first
        ctx.like = [(source.shape, source.dtype, source.device) for source in sources]
        return tuple(found)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = [ctx.group.sum_(grad.clone()) for grad in grads]
        if ctx.first:
            return None, None, None, *total
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)
        return None, None, None, *zeros
