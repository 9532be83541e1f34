"""A run stops at the first NaN or Inf, before weights change. Each check waits for the device once."""

import torch
from torch import Tensor

from sparseclt.model.activations import Activations

STOPPED = "stopped before the optimiser's step"
OVERFLOW = "fp16 ends at 65,504: give model.dtype 'bf16' or 'fp32'"


class NonFiniteError(ValueError):
    """NaN or Inf in activations, loss or gradients; raised before the optimiser's step."""


def check_activations(activations: Activations, step: int) -> None:
    """Raises NonFiniteError, naming the activation and its layer."""
    a = activations
    by_layer = zip(a.attn_out, a.x, a.mlp_out, strict=True)  # in the order of the run: the first one is the cause
    tensors = {
        f"{name} of layer {layer}": tensor
        for layer, tensors in enumerate(by_layer)
        for name, tensor in zip(("attn_out", "x", "mlp_out"), tensors, strict=True)
    }
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()])
    if not finite.all():
        bad = next(name for name, good in zip(tensors, finite.tolist(), strict=True) if not good)
        why = f"; {OVERFLOW}" if activations.r_0.dtype == torch.float16 else ""
        raise NonFiniteError(f"step {step}: the model's {bad} has NaN or Inf; {STOPPED}{why}")


def check_loss(total: Tensor, terms: dict[str, Tensor], step: int) -> None:
    """Raises NonFiniteError, naming the first term of the loss that is not finite."""
    if not torch.isfinite(total):
        bad = next((name for name, term in terms.items() if not torch.isfinite(term)), "loss")
        raise NonFiniteError(f"step {step}: {bad} is {terms[bad].item()}; {STOPPED}")


def check_gradient(spoiled: str | None, step: int) -> None:
    """Raises NonFiniteError if `spoiled` names a parameter."""
    if spoiled is not None:
        raise NonFiniteError(f"step {step}: the gradient of {spoiled} is not finite; {STOPPED}")
