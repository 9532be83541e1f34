"""The terms of the training loss."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from sparseclt.model.modules import Latents
from sparseclt.model.sites import Mode
from sparseclt.ops.rows import add_at_
from sparseclt.parallel import ALONE, Group


class FVUSums(NamedTuple):
    """Sufficient statistics of an FVU; they add up over micro-batches."""

    error: Tensor  # sum over tokens of (y - reconstruction)**2
    square: Tensor  # of (y - a vector)**2
    total: Tensor  # [D] of y - that vector; a scalar 0 if that is the batch's mean

    def value(self, tokens: int) -> Tensor:
        """The FVU over so many tokens."""
        variance = self.square - self.total.square().sum() / tokens
        return self.error / variance.clamp_min(torch.finfo(self.error.dtype).tiny)


class TokenSum(NamedTuple):
    """A sum over tokens, for a mean over tokens; it adds up over micro-batches."""

    total: Tensor

    def value(self, tokens: int) -> Tensor:
        """The mean over so many tokens."""
        return self.total / tokens


class L0Sum(NamedTuple):
    """A sum over tokens of active latents / K, for a penalty of how far its mean is from 1; it adds up over
    micro-batches. One of the losses with which Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction Fidelity
    with JumpReLU Sparse Autoencoders" (2024), train towards a given L0."""

    total: Tensor

    def value(self, tokens: int) -> Tensor:
        """(L0 / K - 1)^2 over so many tokens."""
        return (self.total / tokens - 1).square()


class LossTerm(NamedTuple):
    """One term of the loss: the sum of some FVUs or means, times a weight."""

    mode: Mode
    weight: float
    sums: Sequence[FVUSums | TokenSum | L0Sum]

    def value(self, tokens: int) -> Tensor:
        """Its value, not yet weighted, over so many tokens."""
        return torch.stack([s.value(tokens) for s in self.sums]).sum()

    def tensors(self) -> list[Tensor]:
        """The sums over tokens, one after another."""
        return [tensor for s in self.sums for tensor in s]

    def with_tensors(self, tensors: Iterator[Tensor]) -> "LossTerm":
        """The same term with other sums, in the order of `tensors()`."""
        return self._replace(sums=[type(s)(*(next(tensors) for _ in s)) for s in self.sums])


def mean_over(y: Tensor, counted: Tensor | None, data: Group = ALONE) -> Tensor:
    """The mean [D] of y [N, D] over the tokens that count; `counted` [N] boolean, None: all. `data`: the ranks that
    have the other tokens of the batch."""
    if counted is None and data.alone:
        return y.mean(0)
    weights = y.new_ones(len(y)) if counted is None else counted.to(y.dtype)
    return data.sum_(weights @ y) / data.sum_(weights.sum())


def squares_around(y: Tensor, mean: Tensor, counted: Tensor | None) -> Tensor:
    """The sum of (y - mean)**2, a scalar: y [N, D], `mean` [D] that of the whole batch of which y is a part, over the
    tokens that count; `counted` [N] boolean, None: all."""
    squares = (y - mean).square().sum(1)
    return squares.sum() if counted is None else squares @ counted.to(y.dtype)


def fvu_sums(y: Tensor, reconstruction: Tensor, squares: Tensor) -> FVUSums:
    """Sufficient statistics of `fvu(y, reconstruction)`; y [N, D] gets no gradient. `squares`: of y, `squares_around`
    the batch's mean. At tokens that do not count the reconstruction must be y."""
    # mse_loss keeps no difference for backward.
    return FVUSums(mse_loss(reconstruction, y, reduction="sum"), squares, y.new_zeros(()))


def fvu(y: Tensor, reconstruction: Tensor) -> Tensor:
    """Fraction of variance unexplained, a scalar: equivalent to
    `((y - reconstruction)**2).sum() / ((y - y.mean(0))**2).sum()`, the mean over all N tokens of y [N, D]."""
    return fvu_sums(y, reconstruction, squares_around(y, y.mean(0), None)).value(len(y))


def latent_fvu_sums(latents: Latents, target: Latents, F: int) -> FVUSums:
    """Sufficient statistics of `latent_fvu(latents, target, F)`; both get gradients.

    Each latent's partner is looked up among the token's sorted targets: nothing of size N x F or N x K x K exists.
    Indices are distinct within a token.
    """
    wanted, (ids, order) = latents.indices.contiguous(), target.indices.contiguous().sort(1)
    place = torch.searchsorted(ids, wanted).clamp_max_(ids.shape[1] - 1)
    partner = target.values.gather(1, order.gather(1, place))
    inner = (latents.values * partner.where(ids.gather(1, place) == wanted, 0.0)).sum()
    square = target.values.square().sum()
    total = torch.zeros(F, dtype=square.dtype, device=square.device)
    total = add_at_(total, target.indices.flatten().clamp_min(0), target.values.flatten())
    return FVUSums(latents.values.square().sum() - 2 * inner + square, square, total)


def latent_fvu(latents: Latents, target: Latents, F: int) -> Tensor:
    """FVU of sparse latents against sparse target latents, a scalar: equivalent to
    `fvu(target.dense(F), latents.dense(F))`."""
    return latent_fvu_sums(latents, target, F).value(len(target.values))
