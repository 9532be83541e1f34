"""What is recorded of a run of the language model, and the hooks that record it and replace outputs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparseclt.model.activations import Activations, at_least_float32

Hook = tuple[str, Callable[..., Tensor | None]]


Replace = Callable[[int, Activations], Tensor]


class StopRun(Exception):
    """Ends a run behind the last covered layer."""


@dataclass(frozen=True)
class BlockNorms:
    """The norms of a block, by their names in it; None where there is none."""

    before_attention: str | None = "ln1"
    behind_attention: str | None = None
    before_mlp: str | None = "ln2"
    reads: str | None = None  # what a CLT reads in place of the MLP's input: see `LanguageModel.reading`

    @classmethod
    def of(cls, bridge: Any, parallel: bool) -> "BlockNorms":
        """Those of the first block of a `TransformerBridge`."""

        def present(name: str) -> str | None:
            return name if f"blocks.0.{name}.hook_scale" in bridge.hook_dict else None

        before, own = present("ln1"), present("ln2")
        # Parallel blocks with a single norm (GPT-J, Phi): the MLP reads the one before attention.
        return cls(before, present("ln1_post"), before if parallel and own is None else own)

    @property
    def mlp_input(self) -> str:
        """The hook of what the MLP reads, before the gain and bias of a norm."""
        if self.reads is not None:
            return self.reads
        return "mlp.hook_in" if self.before_mlp is None else f"{self.before_mlp}.hook_normalized"


def recording_hooks(
    layers: int,
    norms: BlockNorms,
    live: Activations,
    attention: bool,
    on_mlp: Replace | None = None,
    on_attn: Replace | None = None,
) -> list[Hook]:
    """Hooks on the first `layers` blocks that fill `live` in the order of the run.

    Where `on_mlp` (`on_attn`) is given, its result takes the place of the output in the run and in `live`.
    """

    def embedding(value: Tensor, hook: Any) -> None:
        live.r_0 = value

    hooks: list[Hook] = [("blocks.0.hook_resid_pre", embedding)]
    for layer in range(layers):
        block = f"blocks.{layer}"
        hooks += [
            _scale(block, norms.before_mlp, "mlp.hook_in", live.scale),
            (f"{block}.{norms.mlp_input}", _input(live)),
            (f"{block}.hook_attn_out", _keep_or_replace("on_attn", live.attn_out, on_attn, layer, live)),
            (f"{block}.hook_mlp_out", _keep_or_replace("on_mlp", live.mlp_out, on_mlp, layer, live)),
        ]
        if attention:
            hooks += [
                _scale(block, norms.before_attention, "attn.hook_in", live.attn_scale),
                (f"{block}.attn.hook_pattern", _pattern(live.attn_pattern)),
            ]
            if norms.behind_attention:
                hooks.append(_scale(block, norms.behind_attention, "", live.attn_post_scale))
    return hooks


@contextmanager
def patterns_in_time(bridge: Any, hooks: list[Hook]) -> Iterator[list[Hook]]:
    """The `hooks` to run `bridge` with, so that those on attention's pattern run before those on its output.

    A bridge that leaves attention to the wrapped module (GPT-J) reports the pattern last. There it is taken from that
    module while this context lasts.
    """
    from transformer_lens.model_bridge.generalized_components import AttentionBridge

    others, handles = [], []
    for name, hook in hooks:
        attention = bridge.get_submodule(name.rpartition(".")[0]) if name.endswith(".attn.hook_pattern") else None
        if attention is not None and type(attention).forward is AttentionBridge.forward:
            handles.append(attention.original_component.register_forward_hook(_of_output(hook)))
        else:
            others.append((name, hook))
    try:
        yield others
    finally:
        for handle in handles:
            handle.remove()


def _of_output(hook: Callable[..., Tensor | None]) -> Callable[..., None]:
    """`hook` for the pattern among what a module of transformers returns."""

    def forward_hook(module: Any, arguments: Any, output: tuple[Tensor, ...]) -> None:
        hook(output[1], None)

    return forward_hook


def _scale(block: str, norm: str | None, without_norm: str, kept: list[Tensor]) -> Hook:
    """Keeps what `norm` divides by, [B, S]: 1 without a norm, then noted at hook `without_norm`."""

    def hook(value: Tensor, hook: Any) -> None:
        kept.append(at_least_float32(value[..., 0] if norm else value.new_ones(value.shape[:-1])))

    return f"{block}.{norm}.hook_scale" if norm else f"{block}.{without_norm}", hook


def _input(live: Activations) -> Callable:
    """Keeps the MLP's input in the model's dtype: its norm computes in float32."""

    def hook(value: Tensor, hook: Any) -> None:
        live.x.append(value.to(live.r_0.dtype))

    return hook


def _pattern(kept: list[Tensor]) -> Callable:
    def hook(value: Tensor, hook: Any) -> None:
        kept.append(value)

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
