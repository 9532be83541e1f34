"""What the connections of attention latents contribute to their largest values.

An MLP latent's contributions follow from the latents at its own token, which are kept. An attention latent reads all
tokens before it, through a pattern too large to keep: so its contributions are kept while the pattern is there.
"""

import torch
from torch import Tensor


class StrongestFirings:
    """For each latent of a module, the largest firings of at most `kept` rows of text and their contributions:
    `token` [F, kept] (-1: none yet), `value` [F, kept], `contribution` [F, kept, C]."""

    def __init__(self, shape: torch.Size, kept: int, device: torch.device):
        F, C = shape
        self.token = torch.full((F, kept), -1, device=device)
        self.value = torch.zeros(F, kept, device=device)
        self.contribution = torch.zeros(F, kept, C, device=device)

    def add(self, token: Tensor, latent: Tensor, value: Tensor, contribution: Tensor) -> None:
        """Take in the firings of one row of text: token, latent and value [n], contribution [n, C]."""
        order = value.float().argsort(descending=True, stable=True)
        order = order[latent[order].argsort(stable=True)]
        first = torch.ones_like(order, dtype=torch.bool)
        first[1:] = latent[order][1:] != latent[order][:-1]
        best = order[first]
        weakest, place = self.value[latent[best]].min(1)
        better = value[best].float() > weakest
        best, where = best[better], (latent[best][better], place[better])
        self.token[where], self.value[where] = token[best], value[best].float()
        self.contribution[where] = contribution[best].float()

    def find(self, latent: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """The contributions [n, C] to the firings of `latent` [n] at `token` [n], and which of them are kept [n]."""
        same = self.token[latent] == token[:, None]
        return self.contribution[latent, same.int().argmax(1)], same.any(1)
