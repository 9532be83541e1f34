"""A run stops at the first NaN or Inf, before weights change. A step reads all its checks from the device at once."""

import torch
from torch import Tensor

from sparseclt.model.activations import Activations

STOPPED = "stopped before the optimiser's step"
OVERFLOW = "fp16 ends at 65,504: give model.dtype 'bf16' or 'fp32'"


class NonFiniteError(ValueError):
    """NaN or Inf in activations, loss or gradients; raised before the optimiser's step."""


class Checks:
    """What one step has to check, noted on the device until the norm of its gradient is read."""

    def __init__(self, activations: Activations, step: int):
        self.activations, self.step = activations, step
        self._sums = torch.stack([tensor.sum(dtype=torch.float32) for tensor in _tensors(activations).values()])
        self._loss: tuple[Tensor, dict[str, Tensor]] | None = None

    def note_loss(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        self._loss = total.detach(), {name: term.detach() for name, term in terms.items()}

    def settle(self, norm: Tensor) -> float:
        """The norm of the gradient, read together with the checks. Raises NonFiniteError for activations and loss."""
        assert self._loss is not None
        total, terms = self._loss
        flags = torch.stack([self._sums.isfinite().all(), torch.isfinite(total)]).to(norm.dtype)
        activations, loss, length = torch.cat([flags, norm.reshape(1)]).tolist()
        if not activations:  # unless only a sum of theirs has overflowed
            check_activations(self.activations, self.step)
        if not loss:
            check_loss(total, terms, self.step)
        return float(length)


def _tensors(activations: Activations) -> dict[str, Tensor]:
    a = activations
    by_layer = zip(a.attn_out, a.x, a.mlp_out, strict=True)  # in the order of the run: the first one is the cause
    return {
        f"{name} of layer {layer}": tensor
        for layer, tensors in enumerate(by_layer)
        for name, tensor in zip(("attn_out", "x", "mlp_out"), tensors, strict=True)
    }


def check_activations(activations: Activations, step: int) -> None:
    """Raises NonFiniteError, naming the activation and its layer."""
    tensors = _tensors(activations)
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
