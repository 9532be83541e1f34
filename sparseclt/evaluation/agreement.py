"""How far a replaced model's next-token probabilities are from the language model's own."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A replaced model against the language model, over the tokens that `LanguageModel.cross_entropy` counts."""

    kl: float
    """Mean KL divergence from the language model's next-token probabilities to the replaced model's, in nats."""
    top1: float
    """Share of tokens behind which both find the same next token likeliest."""


class AgreementSums:
    """KL divergences and agreeing tokens, by name, summed up."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, real: Tensor, replaced: Tensor) -> None:
        """Take in the logits [B, S, V] of both models. The predictions behind position 0 and the last one do not
        count, as in cross-entropy."""
        total = torch.zeros(3, dtype=torch.float64)
        for p, q in zip(real, replaced, strict=True):  # a row at a time: no further tensors of their size
            p, q = p[1:-1].double().log_softmax(-1), q[1:-1].double().log_softmax(-1)
            same = (p.argmax(-1) == q.argmax(-1)).sum()
            total += torch.stack([(p.exp() * (p - q)).sum(), same, same.new_tensor(len(p))]).double().cpu()
        self.sums[name] = self.sums.get(name, 0) + total

    def means(self) -> dict[str, Agreement]:
        """Means over all tokens so far."""
        return {
            name: Agreement(kl=(kl / tokens).item(), top1=(same / tokens).item())
            for name, (kl, same, tokens) in self.sums.items()
        }
