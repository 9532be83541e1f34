"""Running statistics of the latents of one mode: which are dead, and how large they are when they are not."""

import torch
from torch import Tensor

from sparseclt.modules import Latents


class Activity:
    """Per module and latent, [M, F] each: tokens since it last fired, and running means over tokens.

    `mean` is E[z], `square` is E[z^2], exponential averages over `horizon` tokens, bias-corrected by `weight`.
    """

    def __init__(self, modules: int, latents: int, horizon: int = 50_000, device: str | torch.device = "cpu"):
        self.horizon = horizon
        self.tokens_since_fired = torch.zeros(modules, latents, dtype=torch.int64, device=device)
        self.mean = torch.zeros(modules, latents, device=device)
        self.square = torch.zeros(modules, latents, device=device)
        self.weight = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(self, latents: list[Latents]) -> None:
        for m, (values, indices) in enumerate(latents):
            tokens, values = len(values), values.detach().flatten().float()
            decay = 0.5 ** (tokens / self.horizon)
            ids = indices.flatten().clamp_min(0)
            mean, square = torch.zeros_like(self.mean[m]), torch.zeros_like(self.mean[m])
            mean.scatter_add_(0, ids, values / tokens)
            square.scatter_add_(0, ids, values.square() / tokens)
            self.mean[m].mul_(decay).add_(mean, alpha=1 - decay)
            self.square[m].mul_(decay).add_(square, alpha=1 - decay)
            self.tokens_since_fired[m] += tokens
            self.tokens_since_fired[m][mean > 0] = 0
        self.weight = 1 - (1 - self.weight) * decay

    def magnitude(self, statistic: str) -> Tensor:
        """s [M, F]: the running 'mean' or root mean square ('rms') of every latent."""
        corrected = 1 / self.weight.clamp_min(1e-12).float()
        return self.mean * corrected if statistic == "mean" else (self.square * corrected).sqrt()

    def dead(self, after_tokens: int) -> Tensor:
        """Boolean [M, F]: latents that have not fired for `after_tokens` tokens."""
        return self.tokens_since_fired >= after_tokens

    def state(self) -> dict[str, Tensor]:
        return {
            "tokens_since_fired": self.tokens_since_fired,
            "mean": self.mean,
            "square": self.square,
            "weight": self.weight,
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
