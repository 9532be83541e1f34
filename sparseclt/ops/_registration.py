"""Registration of the ops with `torch.library`: kernels that compile, export and fake tensors treat as one node.

`Library.define` and `impl` stand in for `torch.library.custom_op`, which adds 3 s to the first call (it imports
torch._dynamo to keep itself from being traced) and 15 us to each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("sparseclt", "DEF")
kernels: dict[str, Callable[..., Any]] = {}  # by name, "sparseclt::topk_encode"


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """The operator `sparseclt::NAME`, callable, for `schema` = "NAME(arguments) -> results".

    `kernel` computes fresh tensors that alias no argument; `fake` gives their shapes; `backward(ctx, *grads)`
    the gradients of all arguments from what `save(ctx, inputs, output)` kept, none: not differentiable.
    """
    name = f"sparseclt::{schema.partition('(')[0]}"
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name} has no derivative: its op can be differentiated once")

    torch.library.register_autograd(name, backward or refuse, setup_context=save, lib=_library)
    kernels[name] = kernel
    operator: Callable[..., Any] = getattr(torch.ops.sparseclt, schema.partition("(")[0]).default
    return operator


def present(*gradients: Tensor | None) -> tuple[Tensor, ...]:
    """Results of a backward operator: an empty tensor stands for None."""
    return tuple(torch.empty(0) if gradient is None else gradient for gradient in gradients)


def fake_gradients(needed: list[bool], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Their shapes: those of the inputs, contiguous."""
    return tuple(
        tensor.new_empty(tensor.shape) if need else torch.empty(0) for need, tensor in zip(needed, inputs, strict=True)
    )


def if_needed(needed: list[bool], gradients: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """What autograd wants of a backward operator's results."""
    return tuple(gradient if need else None for need, gradient in zip(needed, gradients, strict=True))
