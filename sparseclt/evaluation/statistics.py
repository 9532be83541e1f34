"""Sums over batches of tokens from which the metrics follow, in double precision."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseclt.model.forward import ForwardPass
from sparseclt.model.modules import Latents
from sparseclt.model.sites import Site
from sparseclt.model.transcoders import Transcoders

DENSITY_EDGES = tuple(quarter / 4 for quarter in range(-24, 1))  # log10 of a firing rate, from 1e-6 to 1
TRAINING_TOKENS = 1_000_000  # a latent that fired on none of the last so many training tokens is dead in training
TWIN_OVERLAP = 0.5  # Jaccard index of the tokens on which two latents fire


class ModeStatistics:
    """Squared errors, active latents, and how often each latent fired, for one pass."""

    def __init__(self, clt: Transcoders):
        M, F = len(clt.sites), clt.architecture.latents
        self.squared_error = torch.zeros(M, dtype=torch.float64)
        self.active = torch.zeros(M, dtype=torch.float64)
        self.fired = torch.zeros(M, F, dtype=torch.int64)

    def add(self, forward: ForwardPass, real: dict[Site, Tensor]) -> None:
        """Take in one pass; `real`: the model's own outputs [N, D]."""
        for m, (site, latents) in enumerate(zip(forward.clt.sites, forward.latents, strict=True)):
            error = (forward.clt.own_columns(real[site]) - forward.output(site)).double().square().sum()
            self.squared_error[m] += forward.clt.ranks.latents.sum_(error).cpu()
            on = latents.values > 0
            self.active[m] += on.sum().cpu()
            self.fired[m] += torch.bincount(latents.indices[on], minlength=self.fired.shape[1]).cpu()

    def sums(self) -> list[Tensor]:
        """All of them, which add up over parts of a text."""
        return [self.squared_error, self.active, self.fired]

    def density(self, m: int, tokens: int) -> list[int]:
        """Latents of module `m` in each bin of `DENSITY_EDGES`: rarer ones in the first, dead ones in none."""
        rates = (self.fired[m][self.fired[m] > 0].double() / tokens).log10()
        bins = torch.bucketize(rates, torch.tensor(DENSITY_EDGES[1:-1], dtype=torch.float64), right=True)
        return torch.bincount(bins, minlength=len(DENSITY_EDGES) - 1).tolist()


class Twins:
    """On how many tokens each latent fires together with the one whose decoder is nearest, `nearest` [F] per module."""

    def __init__(self, nearest: Sequence[Tensor]):
        self.nearest = nearest
        self.both = [torch.zeros(len(index), dtype=torch.int64) for index in nearest]

    def add(self, latents: Sequence[Latents]) -> None:
        """Take in the latents [N, K] of every module."""
        for m, (values, indices) in enumerate(latents):
            on, partner = values > 0, self.nearest[m][indices.clamp_min(0)]
            together = torch.zeros_like(on)
            for k in range(on.shape[1]):  # [N, K] at a time, not [N, K, K]
                together |= (partner == indices[:, k, None]) & on[:, k, None]
            self.both[m] += torch.bincount(indices[on & together], minlength=len(self.both[m])).cpu()

    def share(self, m: int, fired: Tensor) -> float:
        """Share of module `m`'s latents that fire together with the nearest one on more than half of the tokens on
        which either does. `fired` [F]: on how many tokens each does."""
        either = fired + fired[self.nearest[m].cpu()] - self.both[m]
        return (self.both[m] > TWIN_OVERLAP * either).double().mean().item()


class Variance:
    """Squared distance of every site's real output from its mean over all tokens that count."""

    def __init__(self, clt: Transcoders):
        M, D = len(clt.sites), clt.architecture.model.d_model
        self.total, self.square = torch.zeros(M, D, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)
        self.counted = torch.zeros((), dtype=torch.int64)

    def add(self, real: dict[Site, Tensor], counted: Tensor | None = None) -> None:
        """Take in the real outputs [N, D] of one batch. `counted` [N]: the tokens that count; None: all."""
        for m, y in enumerate(real.values()):
            y = (y if counted is None else y[counted]).double()
            self.total[m] += y.sum(0).cpu()
            self.square[m] += y.square().sum().cpu()
        self.counted += len(next(iter(real.values()))) if counted is None else int(counted.sum())

    def sums(self) -> list[Tensor]:
        """All of them, which add up over parts of a text."""
        return [self.total, self.square, self.counted]

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        return int(self.counted)

    def value(self) -> Tensor:
        """[M]"""
        return self.square - self.total.square().sum(1) / self.tokens
