"""Small CLTs with random weights on the tiny models."""

import torch
from tiny_models import LAYERS, WIDTH, hf_model, tokenizer, tokens

from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.model.shape import Architecture

F, K = 20, 5


def language_model(family: str, dtype: torch.dtype = torch.float64) -> LanguageModel:
    return LanguageModel.from_hf(hf_model(family, dtype=dtype), tokenizer(), name=family)


def random_clt(
    model: LanguageModel,
    attention: str = "frozen",
    *,
    latents: int = F,
    active: int = K,
    seed: int = 0,
    activation: str = "topk",
) -> SparseCLT:
    """A CLT whose decoders and biases are random too, without connections."""
    architecture = Architecture(model.shape, latents, active, attention, activation)
    weights = (
        [model.attention_weights(layer) for layer in range(model.shape.layers)] if attention == "latents" else None
    )
    torch.manual_seed(seed)
    clt = SparseCLT(architecture, weights).to(next(model.bridge.original_model.parameters()).dtype)
    with torch.no_grad():
        for module in clt:
            for parameter in (module.b_enc, module.W_dec, module.b_dec):
                parameter.normal_(0, 0.3)
    return clt


def open_all(clt: SparseCLT) -> None:
    """C = U: every latent reads every upstream latent."""
    for module in clt:
        if module.upstream:
            module.connect(torch.arange(module.upstream).expand(module.latents, -1))


def connect_random(clt: SparseCLT, C: int, empty: float = 0.2, seed: int = 0) -> None:
    """C distinct random connections for each latent, a share of the slots empty."""
    generator = torch.Generator().manual_seed(seed)
    for module in clt:
        if module.upstream:
            order = torch.rand(module.latents, module.upstream, generator=generator).argsort(1)[:, :C]
            holes = torch.rand(order.shape, generator=generator) < empty
            module.connect(order.masked_fill(holes, -1))


__all__ = ["F", "K", "LAYERS", "WIDTH", "connect_random", "language_model", "open_all", "random_clt", "tokens"]
