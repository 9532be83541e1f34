"""Dead latents come back: their biases rise until they fire.

A latent dies when it stops being among the K strongest, and from then on it has no gradient. Raising its bias, a little
in each step, brings it back on the tokens that suit it best, and from there its gradient takes over. Wang et al.,
"Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (2024), balance experts by such a bias.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseclt.config import OptimizerConfig
from sparseclt.model.sites import Mode, Site
from sparseclt.model.transcoders import Transcoders

PATIENCE = 110  # times a latent that fires as often as others should have fired before it counts as dead


def dead_after_tokens(config: OptimizerConfig, clt: Transcoders) -> Tensor:
    """Tokens without firing after which a latent is dead, per module [M, 1]."""
    a, own = clt.architecture, config.dead_after_tokens
    after = [own or round(PATIENCE * a.latents / a.active_of(site.layer)) for site in clt.sites]
    return torch.tensor(after, device=clt.transcoder(0).b_enc.device)[:, None]


def amount(config: OptimizerConfig) -> float:
    """By how much a dead latent's bias rises in a step. It stays the same while the learning rate falls: latents die
    until the end."""
    return config.revival_rate * config.learning_rate


def to_revive(dead: Mapping[Mode, Tensor], sites: Sequence[Site]) -> Tensor:
    """Of the latents that are `dead` in each mode, boolean [M, F], those whose biases are to rise.

    A latent of attention that only sparsely-connected mode has no use for is left alone: attention outputs vary in few
    directions, so that many dead latents rise together, fire on most tokens and drive the useful ones out.
    """
    if "sparse" not in dead:
        return dead["vanilla"]
    modules = zip(dead["vanilla"], dead["sparse"], sites, strict=True)
    return torch.stack([vanilla if site.kind == "attn" else vanilla | sparse for vanilla, sparse, site in modules])


@torch.no_grad()
def raise_biases(clt: Transcoders, dead: Tensor, amount: float) -> None:
    """Add `amount`, in units of pre-activations, to the encoder biases of `dead` latents, boolean [M, F]."""
    for module, silent in zip(clt, dead, strict=True):
        module.b_enc.add_(silent[module.rows].to(module.b_enc.dtype), alpha=amount)
