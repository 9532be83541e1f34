"""What is recorded of a run of the language model, and the hooks that record it and replace outputs."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sparseclt.model.activations import Activations

Hook = tuple[str, Callable[..., Tensor | None]]


Replace = Callable[[int, Activations], Tensor]


class StopRun(Exception):
    """Ends a run behind the last covered layer."""


def recording_hooks(
    layers: int,
    mlp_norm: str,
    live: Activations,
    attention: bool,
    on_mlp: Replace | None = None,
    on_attn: Replace | None = None,
) -> list[Hook]:
    """Hooks on the first `layers` blocks that fill `live` in the order of the run.

    Where `on_mlp` (`on_attn`) is given, its result takes the place of the output in the run and in `live`.
    `mlp_norm`: the norm the MLP reads, "ln2" or, with a single norm for both, "ln1".
    """

    def embedding(value: Tensor, hook: Any) -> None:
        live.r_0 = value

    hooks: list[Hook] = [("blocks.0.hook_resid_pre", embedding)]
    for layer in range(layers):
        block = f"blocks.{layer}"
        hooks += [
            (f"{block}.{mlp_norm}.hook_scale", _keep(live.scale, squeeze=True)),
            (f"{block}.{mlp_norm}.hook_normalized", _keep(live.x)),
            (f"{block}.hook_attn_out", _keep_or_replace("on_attn", live.attn_out, on_attn, layer, live)),
            (f"{block}.hook_mlp_out", _keep_or_replace("on_mlp", live.mlp_out, on_mlp, layer, live)),
        ]
        if attention:
            hooks += [
                (f"{block}.ln1.hook_scale", _keep(live.attn_scale, squeeze=True)),
                (f"{block}.attn.hook_pattern", _keep(live.attn_pattern)),
            ]
    return hooks


def _keep(kept: list[Tensor], squeeze: bool = False) -> Callable:
    def hook(value: Tensor, hook: Any) -> None:
        kept.append(value.squeeze(-1) if squeeze else value)

    return hook


def _keep_or_replace(
    argument: str, outputs: list[Tensor], replace: Replace | None, layer: int, live: Activations
) -> Callable:
    def hook(value: Tensor, hook: Any) -> Tensor | None:
        outputs.append(value)
        if replace is None:
            return None
        replaced = replace(layer, live)
        if replaced.shape != value.shape or replaced.dtype != value.dtype:
            raise ValueError(
                f"{argument}: expected {value.dtype} of shape {tuple(value.shape)} for layer {layer}, "
                f"got {replaced.dtype} of shape {tuple(replaced.shape)}"
            )
        outputs[-1] = replaced
        return replaced

    return hook
