"""The files of a CLT: the circuit-tracer directory layout for cross-layer transcoders, plus sidecars of ours.

Other loaders ignore the sidecars. circuit-tracer runs a model without thresholds as plain ReLU, not as TopK. So that
nobody takes that for the CLT, one without thresholds names a kind that circuit-tracer does not know, and has thresholds
of size 0, on which its `load_clt`, which reads no configuration, stops. `sparseclt export` gives it real ones.
"""

import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.parallel import ALONE, Group
from sparseclt.storage.directories import FORMAT_VERSION, CheckpointError, read_versioned, verified
from sparseclt.storage.json_files import write_json, write_text
from sparseclt.storage.parts import Part
from sparseclt.storage.safetensors_stream import TensorFiles, check_tensor, save_file, stored_names

CONFIG = "sparseclt.json"
UNCALIBRATED = "uncalibrated_cross_layer_transcoder"  # the kind of a CLT without thresholds
# (site, name in memory) -> (file, name in the file): "mlp.3.b_enc" is b_enc_3 in W_enc_3.safetensors.
_LAYOUT = {
    ("mlp", "W_enc"): ("W_enc", "W_enc"),
    ("mlp", "b_enc"): ("W_enc", "b_enc"),
    ("mlp", "b_dec"): ("W_enc", "b_dec"),
    ("mlp", "threshold"): ("W_enc", "threshold"),
    ("mlp", "W_dec"): ("W_dec", "W_dec"),
    ("mlp", "connections"): ("connections", "connections"),
    ("mlp", "logits"): ("connections", "logits"),
    ("mlp", "threshold_sparse"): ("connections", "threshold_sparse"),
    ("attn", "W_enc"): ("attn", "W_enc_attn"),
    ("attn", "b_enc"): ("attn", "b_enc_attn"),
    ("attn", "threshold"): ("attn", "threshold_attn"),
    ("attn", "W_dec"): ("attn", "W_dec_attn"),
    ("attn", "b_dec"): ("attn", "b_dec_attn"),
    ("attn", "connections"): ("attn_connections", "connections_attn"),
    ("attn", "logits"): ("attn_connections", "logits_attn"),
    ("attn", "threshold_sparse"): ("attn_connections", "threshold_sparse_attn"),
    ("attn", "W_V"): ("attn_model", "W_V"),
    ("attn", "W_O"): ("attn_model", "W_O"),
    ("attn", "bias"): ("attn_model", "bias"),
}
_IN_MEMORY = {on_disk: in_memory for in_memory, on_disk in _LAYOUT.items()}
_REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")
_KEY = re.compile(r"(mlp|attn)\.(0|[1-9]\d*)\.(\w+)")
_ON_DISK = re.compile(r"(\w+)_(0|[1-9]\d*)")


def save_clt(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor | Part],
    *,
    mlp_input: str = "ln2.hook_normalized",
    group: Group = ALONE,
) -> None:
    """Write a CLT's weights and configuration into `directory`, which is best one from `atomic_directory`.

    tensors: flat, with keys "mlp.{l}.NAME" and "attn.{l}.NAME". NAME is W_enc [F, D], b_enc [F], b_dec [D],
        W_dec ([F, L-l, D] for mlp, or [F, 1, D] where config["targets"] is "own"; [F, D] for attn), and optionally
        connections [F, C] int32, logits [F, C], threshold [F] and threshold_sparse [F]; for attn also the model's own
        W_V, W_O and bias. mlp layers must be 0..L-1.
        Written a piece at a time: never a copy of a whole tensor.
    config: JSON values, with a "model_name"; tuples come back as lists.
    mlp_input: the TransformerLens hook, in a block, of what the model's MLPs read.
    group: the ranks that write the files together, each its share of the tensors that are a `Part`.

    The files are circuit-tracer's (`config.yaml`, `W_enc_{l}`, `W_dec_{l}`) and our sidecars (`attn_{l}`,
    `connections_{l}`, `attn_connections_{l}`, `attn_model_{l}`, `sparseclt.json`). circuit-tracer refuses a CLT
    without thresholds. Per-layer transcoders ("targets": "own") have no `config.yaml`: circuit-tracer has another
    layout for them.
    Raises ValueError or TypeError for tensors or a config other than these.
    """
    if not isinstance(config.get("model_name"), str):
        raise ValueError(f'config["model_name"] must be the model\'s name, got {config.get("model_name")!r}')
    if "format_version" in config:
        raise ValueError('config must not have the key "format_version", save_clt writes its own: remove it')
    directory = Path(directory)
    own = config.get("targets") == "own"
    files = _group_by_file(tensors, own)
    if group.rank == 0:
        write_json(directory / CONFIG, {"format_version": FORMAT_VERSION, **config}, "config")
    if not own:
        _write_config_yaml(directory, config["model_name"], mlp_input, files, group)
    for file, named_tensors in files.items():
        save_file(named_tensors, directory / file, group)


def _write_config_yaml(
    directory: Path, model_name: str, mlp_input: str, files: dict[str, dict[str, Tensor | Part]], group: Group
) -> None:
    """Write circuit-tracer's configuration; without thresholds one that it refuses, with an empty one in each of the
    `files` of encoders."""
    encoders = {file.split(".")[0].removeprefix("W_enc_"): named for file, named in files.items() if "W_enc_" in file}
    kind, comment = "cross_layer_transcoder", ""
    if "threshold_0" not in encoders["0"]:
        kind, comment = UNCALIBRATED, "# Not calibrated for circuit-tracer: sparseclt export writes a CLT that is.\n"
        for layer, named in encoders.items():
            named[f"threshold_{layer}"] = torch.empty(0)
    if group.rank:
        return
    write_text(
        directory / "config.yaml",
        f"{comment}model_kind: {kind}\n"
        f"model_name: {json.dumps(model_name)}\n"
        f"feature_input_hook: {json.dumps(mlp_input)}\n"
        'feature_output_hook: "hook_mlp_out"\n',
    )


def load_clt(path: str | Path) -> tuple[dict[str, Any], TensorFiles]:
    """Verify a CLT directory and read back (config, tensors) as given to `save_clt`, each tensor read, onto the CPU,
    when it is asked for.

    Raises CheckpointError for a missing or damaged file, a newer format version, or an unknown tensor.
    """
    path, files = verified(path)
    config = read_versioned(path, files, CONFIG)
    places = {}
    for file in files:
        match = _ON_DISK.fullmatch(file.removesuffix(".safetensors"))
        if not match or match[1] not in {stem for stem, _ in _IN_MEMORY}:
            continue
        stem, layer = match.groups()
        for stored in stored_names(path / file):
            in_memory = _IN_MEMORY.get((stem, stored.removesuffix(f"_{layer}")))
            if in_memory is None or not stored.endswith(f"_{layer}"):
                raise CheckpointError(f"{path / file}: unknown tensor {reprlib.repr(stored)} for layer {layer}")
            places[f"{in_memory[0]}.{layer}.{in_memory[1]}"] = path / file, stored
    return config, TensorFiles(_without_empty_thresholds(places))


def _without_empty_thresholds(places: Mapping[str, tuple[Path, str]]) -> dict[str, tuple[Path, str]]:
    """Without the thresholds of size 0 of a CLT that has none."""
    tensors = TensorFiles(places)
    empty = {name for name in tensors if name.endswith(".threshold") and tensors.shape(name) == (0,)}
    return {name: place for name, place in places.items() if name not in empty}


def _group_by_file(tensors: Mapping[str, Tensor | Part], own_targets: bool) -> dict[str, dict[str, Tensor | Part]]:
    """Check the tensors of a CLT and sort them into {file name: {name in the file: tensor}}."""
    files: dict[str, dict[str, Tensor | Part]] = {}
    modules: dict[tuple[str, int], set[str]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or (match[1], match[3]) not in _LAYOUT:
            known = ", ".join(f"{site}.{{l}}.{name}" for site, name in _LAYOUT)
            raise ValueError(f"tensors has the unknown key {key!r}, expected one of {known}")
        check_tensor(key, tensor)
        site, layer, name = match.groups()
        if name == "connections" and tensor.dtype != torch.int32:
            raise ValueError(f"tensors[{key!r}] must be torch.int32, got {tensor.dtype}: use .int()")
        stem, stored = _LAYOUT[site, name]
        files.setdefault(f"{stem}_{layer}.safetensors", {})[f"{stored}_{layer}"] = tensor
        modules.setdefault((site, int(layer)), set()).add(name)
    for (site, layer), names in modules.items():
        for name in _REQUIRED:
            if name not in names:
                expected = ", ".join(_REQUIRED)
                raise ValueError(f"tensors lacks {site}.{layer}.{name}: every module needs {expected}")
    layers = sorted(layer for site, layer in modules if site == "mlp")
    if layers != list(range(len(layers))):
        raise ValueError(f"tensors must hold the mlp layers 0..L-1 without gaps, got {layers}")
    for layer in layers:
        shape = tuple(tensors[f"mlp.{layer}.W_dec"].shape)
        targets = 1 if own_targets else len(layers) - layer
        if len(shape) != 3 or shape[1] != targets:
            expected = f"[F, {targets}, D] ({'its own layer' if own_targets else 'L - l'} targets)"
            raise ValueError(f"tensors['mlp.{layer}.W_dec'] must be {expected}, got {shape}")
    return files
