"""Dead latents come back: their biases rise until they fire.

A latent dies when it stops being among the K strongest, and from then on it has no gradient. Raising its bias, a little
in each step, brings it back on the tokens that suit it best, and from there its gradient takes over. Wang et al.,
"Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (2024), balance experts by such a bias.
"""

import torch
from torch import Tensor

from sparseclt.config import OptimizerConfig, TrainConfig
from sparseclt.model.transcoders import Transcoders

PATIENCE = 150  # times a latent that fires as often as others should have fired before it counts as dead


def dead_after_tokens(config: TrainConfig) -> int:
    """Tokens without firing after which a latent is dead."""
    return config.optimizer.dead_after_tokens or round(PATIENCE * config.clt.latents / config.clt.active)


def amount(config: OptimizerConfig) -> float:
    """By how much a dead latent's bias rises in a step. It stays the same while the learning rate falls: latents die
    until the end."""
    return config.revival_rate * config.learning_rate


@torch.no_grad()
def raise_biases(clt: Transcoders, dead: Tensor, amount: float) -> None:
    """Add `amount`, in units of pre-activations, to the encoder biases of `dead` latents, boolean [M, F]."""
    for module, silent in zip(clt, dead, strict=True):
        module.b_enc.add_(silent[module.rows].to(module.b_enc.dtype), alpha=amount)
