"""Gemma Scope 2: cross-layer transcoders (`clt/`) and per-layer transcoders (`transcoder_all/`) of Gemma 3.

Source: huggingface.co/google/gemma-scope-2, and circuit-tracer's `load_gemma_scope_2_clt`. JumpReLU; encoders are
stored as [D, F], and the decoders of a CLT as [F, L, D] over all layers, of which those before the latent's own are
zero, or left out, as circuit-tracer does. Directories with an affine skip connection (`_affine`) hold more than a
`SparseCLT`.
"""

import re
import warnings
from pathlib import Path
from typing import Any

from sparseclt.formats.foreign import ForeignCLT, nonnegative
from sparseclt.formats.layers import by_layer, expect, folders_with, json_of, numbered, the_same
from sparseclt.formats.lazy import ForeignFiles, LazyTensor, stacked
from sparseclt.storage.directories import CheckpointError

NAME, CONFIG, PARAMS = "gemma-scope-2", "config.json", "params.safetensors"
HOOKS = {"pre_feedforward_layernorm.output": "mlp.hook_in", "post_feedforward_layernorm.output": "hook_mlp_out"}
NAMES = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold", "affine_skip_connection")


def recognises(folder: Path) -> bool:
    """Whether `folder` is laid out so."""
    return (folder / "params_layer_0.safetensors").exists() or bool(folders_with(folder, PARAMS))


def read(folder: Path) -> ForeignCLT:
    """The CLT, or the set of transcoders, in `folder`, every tensor by its header."""
    across = (folder / "params_layer_0.safetensors").exists()
    if across:
        names = numbered(folder, r"params_layer_(\d+)\.safetensors")
        configs = [json_of(folder, CONFIG)] if (folder / CONFIG).exists() else [{}]
    else:
        folders = by_layer(((_layer(folder, name), name) for name in folders_with(folder, PARAMS)), folder)
        names = [f"{name}/{PARAMS}" for name in folders]
        configs = [json_of(folder, f"{name}/{CONFIG}") if (folder / name / CONFIG).exists() else {} for name in folders]
    for config in configs:
        expect(folder / CONFIG, config, architecture=(None, "jump_relu"))
    L0 = configs[0].get("l0")
    return ForeignCLT(
        folder=folder, tensors=_layers(folder, names, across), activation="jumprelu",
        targets="all" if across else "own", active=round(L0) if isinstance(L0, int | float) and L0 >= 1 else None,
        input_hook=the_same(folder, "hf_hook_point_in", (_hook(c, "hf_hook_point_in") for c in configs)),
        output_hook=the_same(folder, "hf_hook_point_out", (_hook(c, "hf_hook_point_out") for c in configs))
        or "hook_mlp_out",
        hooks_at=f"{folder}: {CONFIG}: hf_hook_point_in and hf_hook_point_out",
        model_name=str(configs[0].get("model_name", "")),
    )  # fmt: skip


def _layer(folder: Path, name: str) -> int:
    if not (match := re.match(r"layer_(\d+)(_|$)", name)):
        raise CheckpointError(f"{folder / name}: expected the name to begin with layer_ and a number")
    return int(match[1])


def _hook(config: dict[str, Any], name: str) -> str | None:
    """What TransformerLens calls the hook, within a block; the model's own name for one that it does not know."""
    value = config.get(name)
    if value is None:
        return None
    last = re.sub(r"^.*layers\.\w+\.", "", str(value))
    return HOOKS.get(last, last)


def _layers(folder: Path, names: list[str], across: bool) -> list[dict[str, LazyTensor]]:
    files, L, layers = ForeignFiles(folder, names), len(names), []
    for i, name in enumerate(names):
        files.check_known(name, NAMES)
        files.check_zero(name, "affine_skip_connection", "skip connection; take a directory without _affine")
        stored = files.tensor(name, "w_enc", (None, None))
        D, F = stored.shape
        W_dec = files.tensor(name, "w_dec", (F, L, D) if across else (F, D))
        layers.append(
            {
                "W_enc": stored.converted(lambda w: w.T, (F, D)),
                "b_enc": files.tensor(name, "b_enc", (F,)),
                "b_dec": files.tensor(name, "b_dec", (D,)),
                "W_dec": _from(W_dec, i) if across else stacked([W_dec]),
                "threshold": nonnegative(files.tensor(name, "threshold", (F,)).converted(lambda t: t.clamp_min(0))),
            }
        )
    return layers


def _from(W_dec: LazyTensor, layer: int) -> LazyTensor:
    """The decoders [F, L - l, D] to a latent's own layer l and those behind it, of all [F, L, D]."""

    def later(all_layers: Any) -> Any:
        if bool(all_layers[:, :layer].any()):
            largest = all_layers[:, :layer].abs().max().item()
            warnings.warn(
                f"{W_dec.place} also writes to layers before its own (at most {largest:.2g}), which is left out",
                stacklevel=2,
            )
        return all_layers[:, layer:]

    F, L, D = W_dec.shape
    return W_dec.converted(later, (F, L - layer, D))
