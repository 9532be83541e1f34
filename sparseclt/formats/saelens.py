"""SAELens: per-layer transcoders with ReLU or JumpReLU, one folder per layer.

Source: github.com/decoderesearch/SAELens, `sae_lens/saes/transcoder.py` and `sae.py`. Encoders are stored as [D, F].
What a folder holds is said by its metadata (`hook_name`, `hook_name_out`), not by its name.
"""

import re
from pathlib import Path
from typing import Any

import torch

from sparseclt.formats.foreign import ForeignCLT, nonnegative
from sparseclt.formats.layers import by_layer, expect, folders_with, json_of, the_same
from sparseclt.formats.lazy import ForeignFiles, LazyTensor, stacked
from sparseclt.formats.mlp_input import check_vanilla, folded_encoder, written_hook
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.directories import CheckpointError, atomic_directory
from sparseclt.storage.json_files import write_json
from sparseclt.storage.safetensors_stream import save_file

NAME, CONFIG, WEIGHTS = "saelens", "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = ("transcoder", "jumprelu_transcoder", "skip_transcoder", "jumprelu_skip_transcoder")


def recognises(folder: Path) -> bool:
    """Whether `folder` is laid out so."""
    return bool(folders_with(folder, CONFIG, WEIGHTS))


def read(folder: Path) -> ForeignCLT:
    """The set of transcoders in `folder`, every tensor by its header."""
    configs = {name: json_of(folder, f"{name}/{CONFIG}") for name in folders_with(folder, CONFIG, WEIGHTS)}
    for name, config in configs.items():
        _check(folder / name / CONFIG, config)
    hooks = {name: _hooks(folder / name / CONFIG, config) for name, config in configs.items()}
    names = by_layer(((layer, name) for name, (layer, _, _) in hooks.items()), folder)
    jump = the_same(folder, "architecture", ["jumprelu" in configs[name]["architecture"] for name in names])
    return ForeignCLT(
        folder=folder, tensors=_layers(folder, names, jump), activation="jumprelu" if jump else "relu", targets="own",
        input_hook=the_same(folder, "hook_name", [hooks[name][1] for name in names]),
        output_hook=the_same(folder, "hook_name_out", [hooks[name][2] for name in names]),
        hooks_at=f"{folder / names[0] / CONFIG}: hook_name and hook_name_out",
        model_name=str(_metadata(configs[names[0]]).get("model_name") or ""),
    )  # fmt: skip


def _check(place: Path, config: dict[str, Any]) -> None:
    expect(
        place, config,
        architecture=ARCHITECTURES, normalize_activations=(None, "none"), reshape_activations=(None, "none"),
        apply_b_dec_to_input=(None, False), activation_fn=(None, "relu"),
    )  # fmt: skip
    if config.get("d_out", config.get("d_in")) != config.get("d_in"):
        raise CheckpointError(f"{place}: expected d_out as d_in ({config.get('d_in')!r}), got {config['d_out']!r}")


def _metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Where hooks are named: in `metadata` from SAELens 6 on, among the other fields before it."""
    metadata = config.get("metadata")
    return metadata if isinstance(metadata, dict) else config


def _hooks(place: Path, config: dict[str, Any]) -> tuple[int, str, str]:
    """The layer, and what is read and reconstructed within its block."""
    found = []
    for name in ("hook_name", "hook_name_out"):
        value = _metadata(config).get(name)
        if not isinstance(value, str) or not (match := re.fullmatch(r"blocks\.(\d+)\.(.+)", value)):
            raise CheckpointError(f"{place}: expected {name} to be a hook of a block, such as blocks.0.mlp.hook_in, "
                                  f"got {value!r}")  # fmt: skip
        found.append((int(match[1]), match[2]))
    (layer, read_hook), (layer_out, written_hook) = found
    if layer != layer_out:
        raise CheckpointError(f"{place}: expected hook_name_out in layer {layer}, as hook_name, got layer {layer_out}")
    return layer, read_hook, written_hook


def _layers(folder: Path, names: list[str], jump: bool) -> list[dict[str, LazyTensor]]:
    files, layers = ForeignFiles(folder, [f"{name}/{WEIGHTS}" for name in names]), []
    for name in files.names:
        files.check_known(name, ["W_enc", "b_enc", "W_dec", "b_dec", "W_skip", *(["threshold"] if jump else [])])
        files.check_zero(name, "W_skip", "skip connection")
        stored = files.tensor(name, "W_enc", (None, None))
        D, F = stored.shape
        layers.append(
            {
                "W_enc": stored.converted(lambda w: w.T, (F, D)),
                "b_enc": files.tensor(name, "b_enc", (F,)),
                "W_dec": stacked([files.tensor(name, "W_dec", (F, D))]),
                "b_dec": files.tensor(name, "b_dec", (D,)),
            }
        )
        if jump:
            threshold = files.tensor(name, "threshold", (F,))
            layers[-1]["threshold"] = nonnegative(threshold.converted(lambda t: t.clamp_min(0)))
    return layers


@torch.no_grad()
def write(clt: SparseCLT, language_model: LanguageModel, path: Path) -> Path:
    """Write the vanilla mode of `clt`, per-layer transcoders with thresholds, to directory `path`. Gain and bias of the
    norm before the MLP are folded into the encoder.

    Raises ValueError for decoders to later layers, for TopK (SAELens has no such transcoder; calibrate it), and for
    attention latents.
    """
    a = clt.architecture
    if a.targets == "all":
        raise ValueError("format: saelens holds transcoders of one layer each, got decoders to later layers")
    check_vanilla(clt, NAME, ("jumprelu", "batchtopk"))
    hook = written_hook(clt, language_model)
    with atomic_directory(path) as directory:
        for layer, module in enumerate(clt):
            folder = directory / f"layer_{layer}"
            folder.mkdir()
            W_enc, b_enc = folded_encoder(language_model, layer, module.W_enc, module.b_enc)
            tensors = {"W_enc": W_enc.T, "b_enc": b_enc, "W_dec": module.W_dec[:, 0], "b_dec": module.b_dec}
            save_file(tensors | {"threshold": module.threshold_of("vanilla")}, folder / WEIGHTS)
            metadata = {
                "sae_lens_version": "6.0.0", "model_name": a.model.name, "hook_name": f"blocks.{layer}.{hook}",
                "hook_name_out": f"blocks.{layer}.hook_mlp_out", "model_from_pretrained_kwargs": {"fold_ln": False},
            }  # fmt: skip
            config = {
                "architecture": "jumprelu_transcoder", "d_in": a.model.d_model, "d_out": a.model.d_model,
                "d_sae": a.latents, "dtype": str(W_enc.dtype).removeprefix("torch."), "device": "cpu",
                "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
                "metadata": metadata,
            }  # fmt: skip
            write_json(folder / CONFIG, config, "config")
    return path
