"""The direct effect of a latent's decoders on the model's logits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import at_least_float32
from sparseclt.model.attention import centre

SHOWN = 10
ENTRIES = 1 << 24  # of the logits held at a time


@dataclass(frozen=True)
class Unembedding:
    """The path from the residual stream to the logits: the final norm's gain and the unembedding, linear at a given
    scale of the norm.

    `weight` [D, vocabulary] has the gain folded in and, as a softmax does not see a constant, the mean over the
    vocabulary taken off. `centred`: the norm subtracts the mean over D.
    """

    weight: Tensor
    centred: bool

    @classmethod
    def of(cls, language_model: LanguageModel) -> "Unembedding":
        """That of a language model."""
        bridge = language_model.bridge
        norm = bridge.ln_final
        weight = at_least_float32(bridge.W_U.detach())
        gain = getattr(norm.original_component, "weight", None)
        if gain is not None:
            weight = (gain.detach() + int(norm.uses_weight_offset))[:, None] * weight
        return cls(weight - weight.mean(1, keepdim=True), language_model.shape.centred)

    def logits(self, rows: Tensor) -> Tensor:
        """[n, vocabulary]: logits of `rows` [n, D] written to the residual stream, before the norm's scale divides."""
        rows = rows.to(self.weight.dtype)
        return (centre(rows) if self.centred else rows) @ self.weight


@dataclass(frozen=True)
class Extremes:
    """The SHOWN largest and smallest logits of n rows: ids and values [n, SHOWN]."""

    top: Tensor
    top_values: Tensor
    bottom: Tensor
    bottom_values: Tensor


@torch.no_grad()
def extremes(rows: Tensor, unembedding: Unembedding) -> Extremes:
    """Of `rows` [n, D], a few at a time."""
    vocabulary = unembedding.weight.shape[1]
    k, parts = min(SHOWN, vocabulary), []
    for some in rows.split(max(1, ENTRIES // vocabulary)):
        logits = unembedding.logits(some)
        top, bottom = logits.topk(k, 1), logits.topk(k, 1, largest=False)
        parts.append((top.indices, top.values, bottom.indices, bottom.values))
    return Extremes(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))
