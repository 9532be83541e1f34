"""The latents of the last tokens, in which the newest take the place of the oldest."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparseclt.model.modules import Latents


class Ring:
    """`values` and `indices` [M, tokens, K]: the active latents of the last `tokens` tokens of every module, where K is
    the most that a module has. `seen` tokens were there in all; the next one's place is `seen % tokens`."""

    def __init__(self, modules: int, active: int, tokens: int, device: str | torch.device):
        self.values = torch.zeros(modules, tokens, active, device=device)
        self.indices = torch.zeros(modules, tokens, active, dtype=torch.int32, device=device)
        self.seen = torch.zeros((), dtype=torch.int64)

    def take(self, latents: Sequence[Latents], counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Put the latents of N more tokens into their places, except tokens that are not `counted` [N]. Returns which
        of the N were taken, and the places. The caller, who may have more to put there, adds them to `seen`."""
        device, capacity = self.values.device, self.values.shape[1]
        every = torch.arange(len(latents[0].values), device=device)
        taken = (every if counted is None else every[counted])[-capacity:]
        places = (int(self.seen) + torch.arange(len(taken), device=device)) % capacity
        for m, (values, indices) in enumerate(latents):
            K = values.shape[1]  # of this module; the others may have more
            self.values[m, places, :K] = values.detach()[taken].float()
            self.indices[m, places, :K] = indices[taken].clamp_min(0).int()
        return taken, places

    def at(self, places: Tensor, upstream: slice, F: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Of the latents at `places` [N] those of `upstream`, numbered over all modules side by side with F each, one
        module at a time: values and ids [N, K], counted from where `upstream` starts, -1 for others."""
        for module in range(upstream.start // F, -(-upstream.stop // F)):
            ids, first = self.indices[module, places] + (module * F - upstream.start), module * F
            if first < upstream.start or first + F > upstream.stop:
                ids.masked_fill_((ids < 0) | (ids >= upstream.stop - upstream.start), -1)
            yield self.values[module, places], ids
