"""The two places at which an encoder may read what a block's MLP reads: before the gain and bias of the norm (a
`SparseCLT`) and after them (most other tools: TransformerLens' `mlp.hook_in`)."""

import torch
from torch import Tensor

from sparseclt.language_model.language_model import RESIDUAL, LanguageModel
from sparseclt.model.clt import SparseCLT

SMALLEST_GAIN = 1e-6


def folded_encoder(language_model: LanguageModel, layer: int, W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
    """The encoder [F, D], [F] that reads the MLP's own input and yields the same pre-activations as one that reads
    before the gain g and bias b of the norm: `W_enc / g` and `b_enc - (W_enc / g) @ b`.

    Raises ValueError for a gain that is nearly zero somewhere."""
    norm = language_model.mlp_norm(layer)
    if norm is None:
        return W_enc, b_enc
    gain, bias = norm
    if gain.abs().min() < SMALLEST_GAIN:
        raise ValueError(
            f"model: expected a gain that is nowhere near 0, as it is divided by, of the norm before the MLP of layer "
            f"{layer}, got {gain.abs().min().item():g}"
        )
    W = W_enc.double() / gain.double()
    b = b_enc.double() if bias is None else b_enc.double() - W @ bias.double()
    return W.to(W_enc.dtype), b.to(b_enc.dtype)


@torch.no_grad()
def unfolded_weights(language_model: LanguageModel, layer: int, W_enc: Tensor) -> Tensor:
    """The encoder rows [F, D] that read before the norm's gain, of rows that read the MLP's own input: `W_enc * g`."""
    norm = language_model.mlp_norm(layer)
    return W_enc if norm is None else (W_enc.double() * norm[0].double().cpu()).to(W_enc.dtype)


@torch.no_grad()
def unfolded_bias(language_model: LanguageModel, layer: int, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    """The encoder bias [F] that goes with `unfolded_weights`: `b_enc + W_enc @ b`."""
    norm = language_model.mlp_norm(layer)
    if norm is None or norm[1] is None:
        return b_enc
    return (b_enc.double() + W_enc.double() @ norm[1].double().cpu()).to(b_enc.dtype)


def check_vanilla(clt: SparseCLT, name: str, activations: tuple[str, ...]) -> None:
    """A ValueError unless the format called `name`, which holds one of `activations`, has room for vanilla mode."""
    a = clt.architecture
    if a.activation not in activations:
        raise ValueError(f"format: {name} holds activation {' or '.join(activations)}, got one with {a.activation}")
    if a.attention != "frozen":
        raise ValueError(f"format: {name} has no place for attention latents")


def written_hook(clt: SparseCLT, language_model: LanguageModel) -> str:
    """The hook that the encoders of `clt` read once `folded_encoder` has made them ready for other tools. Raises
    ValueError if `language_model` gives another input than `clt` reads."""
    reads = clt.architecture.model.mlp_input
    if language_model.shape.mlp_input != reads:
        got = language_model.shape.mlp_input
        raise ValueError(f"language_model: expected language_model.reading({reads!r}), got one that reads {got!r}")
    return RESIDUAL if reads == RESIDUAL else "mlp.hook_in"


def has_norm_behind_mlp(language_model: LanguageModel) -> bool:
    """Whether a norm stands between a block's MLP and the residual stream (Gemma-2, Gemma-3, OLMo-2). What such an MLP
    itself puts out is not what a CLT reconstructs."""
    return "blocks.0.ln2_post.hook_scale" in language_model.bridge.hook_dict
