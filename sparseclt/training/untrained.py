"""The CLT that a run begins with."""

import torch

from sparseclt.config import TrainConfig
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.model.shape import Architecture
from sparseclt.parallel import ONE_RANK, Ranks

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_clt(config: TrainConfig, language_model: LanguageModel, ranks: Ranks = ONE_RANK) -> SparseCLT:
    """The untrained CLT of `config` for `language_model`; the same for the same seed, on any number of `ranks`."""
    shape = language_model.shape
    c = config.clt
    architecture = Architecture(
        shape, c.latents, c.active, c.attention, c.activation, c.bandwidth, targets=c.targets,
        active_ratio=c.active_ratio,
    )  # fmt: skip
    attention = None
    if config.clt.attention == "latents":
        attention = [language_model.attention_weights(layer) for layer in range(shape.layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clt = SparseCLT(architecture, attention, ranks=ranks)
    clt.to(DTYPES[config.clt.dtype])
    for module in clt:
        module.keep_wide_thresholds()
    return clt
