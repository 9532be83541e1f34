"""The terms of the training loss."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from sparseclt.model.clt import SparseCLT
from sparseclt.model.forward import ForwardPass
from sparseclt.model.modules import Latents
from sparseclt.model.sites import Site
from sparseclt.ops.rows import add_at_


class Unexplained(NamedTuple):
    """What an FVU follows from: sums over tokens. Those of a batch are the sums of its parts'."""

    error: Tensor  # of (y - reconstruction)**2
    square: Tensor  # of y**2
    total: Tensor  # [D] of y

    def value(self, tokens: int) -> Tensor:
        variance = self.square - self.total.square().sum() / tokens
        return self.error / variance.clamp_min(torch.finfo(self.error.dtype).tiny)


class Total(NamedTuple):
    """A sum over tokens, whose mean is wanted."""

    total: Tensor

    def value(self, tokens: int) -> Tensor:
        return self.total / tokens


def unexplained(y: Tensor, reconstruction: Tensor, mean: Tensor | None = None) -> Unexplained:
    """Of y [N, D], which gets no gradient. `mean` [D]: that of the batch of which y is a part, where it is known."""
    # mse_loss keeps no difference for backward.
    error = mse_loss(reconstruction, y, reduction="sum")
    if mean is not None:
        return Unexplained(error, (y - mean).square().sum(), y.new_zeros(()))
    return Unexplained(error, y.square().sum(), y.sum(0))


def fvu(y: Tensor, reconstruction: Tensor) -> Tensor:
    """Fraction of variance unexplained, a scalar: equivalent to
    `((y - reconstruction)**2).sum() / ((y - y.mean(0))**2).sum()`, the mean over all N tokens of y [N, D]."""
    return unexplained(y, reconstruction, y.mean(0)).value(len(y))


def latents_unexplained(latents: Latents, target: Latents, F: int) -> Unexplained:
    """Of sparse target latents by sparse latents; both get gradients.

    Each latent's partner is searched among the token's sorted targets: nothing of size N x F or N x K x K exists.
    Indices are distinct within a token.
    """
    wanted, (ids, order) = latents.indices.contiguous(), target.indices.contiguous().sort(1)
    place = torch.searchsorted(ids, wanted).clamp_max_(ids.shape[1] - 1)
    partner = target.values.gather(1, order.gather(1, place))
    inner = (latents.values * partner.where(ids.gather(1, place) == wanted, 0.0)).sum()
    square = target.values.square().sum()
    total = torch.zeros(F, dtype=square.dtype, device=square.device)
    total = add_at_(total, target.indices.flatten().clamp_min(0), target.values.flatten())
    return Unexplained(latents.values.square().sum() - 2 * inner + square, square, total)


def latent_fvu(latents: Latents, target: Latents, F: int) -> Tensor:
    """FVU of sparse latents against sparse target latents, a scalar: equivalent to
    `fvu(target.dense(F), latents.dense(F))`."""
    return latents_unexplained(latents, target, F).value(len(target.values))


def targets(clt: SparseCLT, activations) -> dict[Site, Tensor]:
    """The real output [N, D] of every site."""
    outputs = {"mlp": activations.mlp_out, "attn": activations.attn_out}
    return {site: outputs[site.kind][site.layer].flatten(0, 1) for site in clt.sites}


def written_by_dead(forward: ForwardPass, dead: Tensor, k: int) -> dict[Site, Tensor]:
    """What the k strongest dead latents of each module would write to each site, [N, D]; empty where no module has a
    dead latent. `dead` is boolean [M, F].

    Dead latents are encoded as the mode encodes them: from the module's input in vanilla mode, through their
    virtual weights in sparsely-connected mode.
    """
    written: dict[Site, Tensor] = {}
    for index in range(len(forward.clt.sites)):
        rows = dead[index].nonzero().flatten()
        if not len(rows):
            continue
        latents = forward.encode(index, rows, min(k, len(rows)))
        for to, part in forward.decode(index, Latents(latents.values, rows[latents.indices])):
            written[to] = written[to] + part if to in written else part
    return written


def aux_k(written: dict[Site, Tensor], outputs: dict[Site, Tensor], real: dict[Site, Tensor]) -> list[Unexplained]:
    """AuxK: how badly what dead latents would write explains what the live ones left (the detached errors), by
    site."""
    return [unexplained((real[site] - outputs[site]).detach(), part) for site, part in written.items()]
