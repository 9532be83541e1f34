"""A run stops at the first NaN or Inf, before weights change."""

import torch
from torch import Tensor

from sparseclt.model.activations import Activations

STOPPED = "stopped before the optimiser's step"


class NonFiniteError(ValueError):
    """NaN or Inf in activations, loss or gradients; raised before the optimiser's step."""


def check_activations(activations: Activations, step: int) -> None:
    """Raises NonFiniteError, naming the activation and its layer."""
    for name in ("x", "mlp_out", "attn_out"):
        for layer, tensor in enumerate(getattr(activations, name)):
            if not torch.isfinite(tensor).all():
                raise NonFiniteError(f"step {step}: the model's {name} of layer {layer} has NaN or Inf; {STOPPED}")


def check_loss(total: Tensor, terms: dict[str, Tensor], step: int) -> None:
    """Raises NonFiniteError, naming the first term of the loss that is not finite."""
    if not torch.isfinite(total):
        bad = next((name for name, term in terms.items() if not torch.isfinite(term)), "loss")
        raise NonFiniteError(f"step {step}: {bad} is {terms[bad].item()}; {STOPPED}")


def check_gradient(spoiled: str | None, step: int) -> None:
    """Raises NonFiniteError if `spoiled` names a parameter."""
    if spoiled is not None:
        raise NonFiniteError(f"step {step}: the gradient of {spoiled} is not finite; {STOPPED}")
