"""Sums over batches of tokens from which the metrics follow, in double precision."""

import torch
from torch import Tensor

from sparseclt.model.forward import ForwardPass
from sparseclt.model.sites import Site
from sparseclt.model.transcoders import Transcoders


class ModeStatistics:
    """Squared errors, active latents, and how often each latent fired, for one mode."""

    def __init__(self, clt: Transcoders):
        M, F = len(clt.sites), clt.architecture.latents
        self.squared_error = torch.zeros(M, dtype=torch.float64)
        self.active = torch.zeros(M, dtype=torch.float64)
        self.fired = torch.zeros(M, F, dtype=torch.int64)

    def add(self, forward: ForwardPass, real: dict[Site, Tensor]) -> None:
        """Take in one pass; `real`: the model's own outputs [N, D]."""
        for m, (site, latents) in enumerate(zip(forward.clt.sites, forward.latents, strict=True)):
            self.squared_error[m] += (real[site] - forward.output(site)).double().square().sum().cpu()
            on = latents.values > 0
            self.active[m] += on.sum().cpu()
            self.fired[m] += torch.bincount(latents.indices[on], minlength=self.fired.shape[1]).cpu()


class Variance:
    """Squared distance of every site's real output from its mean over all tokens that count."""

    def __init__(self, clt: Transcoders):
        M, D = len(clt.sites), clt.architecture.model.d_model
        self.total, self.square = torch.zeros(M, D, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)
        self.tokens = 0

    def add(self, real: dict[Site, Tensor], counted: Tensor | None = None) -> None:
        """Take in the real outputs [N, D] of one batch. `counted` [N]: the tokens that count; None: all."""
        for m, y in enumerate(real.values()):
            y = (y if counted is None else y[counted]).double()
            self.total[m] += y.sum(0).cpu()
            self.square[m] += y.square().sum().cpu()
        self.tokens += len(next(iter(real.values()))) if counted is None else int(counted.sum())

    def value(self) -> Tensor:
        """[M]"""
        return self.square - self.total.square().sum(1) / self.tokens
