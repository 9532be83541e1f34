"""The activations of a language model that a CLT reads and reconstructs."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Activations:
    """One batch, of a real or a replaced run, in the model's dtype; a list holds one tensor a covered layer.

    `attn_pattern` and `attn_scale` stay empty unless attention was asked for.
    """

    tokens: Tensor  # [B, S]
    r_0: Tensor  # [B, S, D] embedding, plus position embedding where the model adds one
    x: list[Tensor] = field(default_factory=list)  # [B, S, D] the MLP's input before the norm's gain and bias
    scale: list[Tensor] = field(default_factory=list)  # [B, S] what the norm before the MLP divides by
    mlp_out: list[Tensor] = field(default_factory=list)  # [B, S, D]
    attn_out: list[Tensor] = field(default_factory=list)  # [B, S, D]
    attn_pattern: list[Tensor] = field(default_factory=list)  # [B, H, S, S] query, key
    attn_scale: list[Tensor] = field(default_factory=list)  # [B, S] what the norm before attention divides by

    def residual(self, layer: int, after_attention: bool = False) -> Tensor:
        """The residual stream [B, S, D] before block `layer`, or after that block's attention."""
        return sum(self.mlp_out[:layer] + self.attn_out[: layer + after_attention], self.r_0)

    def split(self, rows: int) -> list["Activations"]:
        """Views of `rows` rows each, of fewer at the end."""
        return [self._rows(slice(i, i + rows)) for i in range(0, len(self.tokens), rows)]

    def _rows(self, rows: slice) -> "Activations":
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values[name] = [tensor[rows] for tensor in value] if isinstance(value, list) else value[rows]
        return Activations(**values)
