"""What the products of a training run round to.

Rounded are, as in torch.autocast: encoders, what they read, decoders, the latents that these are multiplied by, virtual
weights, and the gradients that meet any of them. A product of two bf16 numbers is exact in fp32, and all sums are fp32.
Biases and norms' scales join those sums as they are. Losses, thresholds, the optimiser, the sums of decoder vectors
that virtual weights read, and the choice of connections stay in fp32, and so does everything after training. bf16 has
the exponents of fp32: no loss needs scaling.
"""

import torch

from sparseclt.config import TrainConfig
from sparseclt.devices import has_bf16, resolve


def products(config: TrainConfig) -> torch.dtype | None:
    """The dtype that products round to (`Transcoders.products`); None: they read the weights as they are."""
    precision = config.compute.precision
    if precision is None:
        precision = "bf16" if has_bf16(resolve(config.device)) and config.clt.attention != "latents" else "fp32"
    return torch.bfloat16 if precision == "bf16" and config.clt.dtype == "fp32" else None
