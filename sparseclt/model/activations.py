"""The activations of a language model that a CLT reads and reconstructs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparseclt.model.sites import Site


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself, or, of a language model in half precision, a copy in float32: what is computed with."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@dataclass
class Activations:
    """One batch, of a real or a replaced run, in the model's dtype. Lists hold one tensor per covered layer.

    `attn_pattern`, `attn_scale` and `attn_post_scale` stay empty unless attention was asked for, the last one also
    without a norm behind attention. Scales are 1 without a norm, and in float32 where the model is in half precision.

    `counted`: the tokens that a CLT explains; None: all of them. At the others (position 0 of a row, where many models
    have activations a thousand times larger than elsewhere) a pass has no latents and keeps the model's own outputs,
    and no loss and no figure includes them.
    """

    tokens: Tensor  # [B, S]
    r_0: Tensor  # [B, S, D] embedding, plus position embedding where the model adds one
    x: list[Tensor] = field(default_factory=list)  # [B, S, D] the MLP's input before the norm's gain and bias
    scale: list[Tensor] = field(default_factory=list)  # [B, S] what the norm before the MLP divides by
    mlp_out: list[Tensor] = field(default_factory=list)  # [B, S, D]
    attn_out: list[Tensor] = field(default_factory=list)  # [B, S, D]
    attn_pattern: list[Tensor] = field(default_factory=list)  # [B, H, S, S] query, key
    attn_scale: list[Tensor] = field(default_factory=list)  # [B, S] what the norm before attention divides by
    attn_post_scale: list[Tensor] = field(default_factory=list)  # [B, S] what a norm behind attention divides by
    counted: Tensor | None = None  # [B, S] bool
    mlp_input: str | None = None  # the hook of x (`ModelShape.mlp_input`); None: not noted

    @cached_property
    def counted_tokens(self) -> int:
        """How many tokens count. Whoever makes a batch may set it: to count them waits for the device."""
        return self.tokens.numel() if self.counted is None else int(self.counted.sum())

    @property
    def counted_flat(self) -> Tensor | None:
        """`counted` with tokens flattened, [N]."""
        return None if self.counted is None else self.counted.flatten()

    def where_counted(self, values: Tensor, otherwise: Tensor | float) -> Tensor:
        """`values` ([N, ...], or broadcast to it) at the tokens that count, `otherwise` at the others."""
        if self.counted is None:
            return values
        return torch.where(self.counted.flatten()[:, None], values, otherwise)

    def input(self, site: Site) -> Tensor:
        """What the encoder of a site reads in vanilla mode, [N, D]: the MLP's own input, or attention's output."""
        return (self.x if site.kind == "mlp" else self.attn_out)[site.layer].flatten(0, 1)

    def output(self, site: Site) -> Tensor:
        """The model's own output of a site, [N, D], at least in float32: tokens flattened to N = B S."""
        return at_least_float32((self.mlp_out if site.kind == "mlp" else self.attn_out)[site.layer].flatten(0, 1))

    def outputs(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """The model's own outputs of several sites, [N, D] each: what a CLT reconstructs."""
        return {site: self.output(site) for site in sites}

    def residual(self, layer: int, after_attention: bool = False) -> Tensor:
        """The residual stream [B, S, D] before block `layer`, or after that block's attention, at least in float32."""
        return sum(self.mlp_out[:layer] + self.attn_out[: layer + after_attention], at_least_float32(self.r_0))

    def mix(self, layer: int) -> Tensor:
        """What attention of `layer` multiplies values with, given its norms: [B, H, S, S], at least in float32. The
        pattern over the key's scale and, where a norm follows attention, over the query's scale there."""
        mix = self.attn_pattern[layer] / self.attn_scale[layer][:, None, None, :]
        return mix / self.attn_post_scale[layer][:, None, :, None] if self.attn_post_scale else mix

    def to(self, device: torch.device) -> "Activations":
        """The same on `device`; these themselves, if they are there."""
        return self if self.r_0.device == device else self.mapped(lambda tensor: tensor.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "Activations":
        """The same with what `function` makes of every tensor."""
        values: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            values[name] = [function(tensor) for tensor in value] if isinstance(value, list) else value
            if isinstance(value, Tensor):
                values[name] = function(value)
        return Activations(**values)

    def split(self, rows: int) -> list["Activations"]:
        """Views of `rows` rows each; the last may have fewer."""
        return [self.rows(i, rows) for i in range(0, len(self.tokens), rows)]

    def rows(self, first: int, count: int) -> "Activations":
        """A view of `count` rows from `first` on, or of fewer at the end."""
        return self.mapped(lambda tensor: tensor[first : first + count])


def all_but_first(tokens: Tensor) -> Tensor:
    """`Activations.counted` of whole rows `tokens` [B, S]: every position but 0."""
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    return counted


def of_whole_rows(tokens: Tensor, mlp_input: str | None) -> Activations:
    """Activations yet to be filled, of whole rows `tokens` [B, S], whose position 0 does not count."""
    activations = Activations(tokens, torch.empty(0), counted=all_but_first(tokens), mlp_input=mlp_input)
    activations.counted_tokens = tokens.numel() - len(tokens)  # known without asking the device
    return activations
