"""Which tokens attention reads: at every token the keys that its heads attend to most."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparseclt.model.activations import Activations

KEYS = 4  # of each token, in the mean over the heads


class Attended(NamedTuple):
    """The strongest keys of N tokens, [N, P] each: how many counted tokens `back` they lie, and the `weights` with
    which their values are mixed (0: a key that does not count)."""

    back: Tensor
    weights: Tensor


def attended(activations: Activations, layer: int) -> Attended:
    """The strongest keys of every token in the attention of `layer`."""
    mix = activations.mix(layer).mean(1)
    weights, keys = mix.topk(min(KEYS, mix.shape[-1]), dim=-1)
    counted = torch.ones_like(activations.tokens) if activations.counted is None else activations.counted
    counted = counted.to(torch.int32)
    place = counted.flatten().cumsum(0, dtype=torch.int32).view_as(counted)
    back = place[:, :, None] - _of_keys(place, keys)
    return Attended(back.flatten(0, 1), (weights * _of_keys(counted, keys)).flatten(0, 1))


def _of_keys(values: Tensor, keys: Tensor) -> Tensor:
    """Of `values` [B, S] those of `keys` [B, S, P]."""
    return values.gather(1, keys.flatten(1)).view_as(keys)


class RecentlyAttended:
    """The strongest keys of the last `tokens` tokens, of each attention module: a ring beside `RecentLatents`."""

    def __init__(self, modules: list[int], tokens: int, device: str | torch.device = "cpu"):
        self.modules = modules  # indices of the attention modules
        self.back = torch.zeros(len(modules), tokens, KEYS, dtype=torch.int32, device=device)
        self.weights = torch.zeros(len(modules), tokens, KEYS, device=device)

    def add(self, keys: Sequence[Attended], taken: Tensor, places: Tensor) -> None:
        """Put the keys of tokens `taken` into `places`; `keys`: one entry per attention module."""
        for ring, (back, weights) in enumerate(keys):
            P = back.shape[1]  # fewer than KEYS in very short rows
            self.back[ring, places, :P] = back[taken].int()
            self.weights[ring, places, :P] = weights[taken].float()
            self.weights[ring, places, P:] = 0

    def of(self, module: int) -> Attended:
        """The ring of attention module `module`."""
        ring = self.modules.index(module)
        return Attended(self.back[ring], self.weights[ring])

    def state(self) -> dict[str, Tensor]:
        return {"attended_back": self.back, "attended_weights": self.weights}
