"""How a language model reads logits off its last residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.attention import centre


@dataclass
class FinalStream:
    """What the final norm met in a run: filled while the run goes on."""

    residual: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, S, D] before the final norm
    scale: Tensor = field(default_factory=lambda: torch.empty(0))  # [B, S] what the final norm divides by


@contextmanager
def recorded_final_stream(model: LanguageModel) -> Iterator[FinalStream]:
    """Within the context, every run of `model` writes what its final norm met into the object that is given."""
    seen = FinalStream()

    def residual(value: Tensor, hook: Any) -> None:
        seen.residual = value

    def scale(value: Tensor, hook: Any) -> None:
        seen.scale = value.squeeze(-1)

    with model.bridge.hooks(fwd_hooks=[("ln_final.hook_in", residual), ("ln_final.hook_scale", scale)]):
        yield seen


def logit_directions(
    model: LanguageModel, tokens: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Directions [k, D] and offsets [k], in `dtype`, for `tokens` [k] (None: the whole vocabulary): the logits minus
    their mean over the vocabulary are `residual @ directions.T / scale + offsets`.

    The final norm's gain and bias are folded in. Subtracting the mean changes no probability; circuit-tracer does the
    same, so that a contribution says what sets a token apart from the others.
    """
    unembed, norm = model.bridge.unembed, model.bridge.ln_final
    W_U = unembed.W_U.detach()  # [D, V]
    wanted = slice(None) if tokens is None else tokens
    chosen = W_U[:, wanted].to(dtype) - W_U.mean(1, keepdim=True, dtype=dtype)
    offsets = chosen.new_zeros(chosen.shape[1])
    if unembed.b_U is not None:
        offsets = offsets + unembed.b_U[wanted].to(dtype) - unembed.b_U.to(dtype).mean()
    bias = getattr(norm.original_component, "bias", None)
    if bias is not None:
        offsets = offsets + bias.detach().to(dtype) @ chosen
    if (weight := getattr(norm.original_component, "weight", None)) is not None:
        chosen = (weight.detach().to(dtype) + int(norm.uses_weight_offset))[:, None] * chosen
    directions = chosen.T
    return (directions if model.bridge.cfg.uses_rms_norm else centre(directions)), offsets
