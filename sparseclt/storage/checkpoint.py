"""Directories of tensors on disk that survive a crash and notice a flipped byte.

A checkpoint is a directory. It is written beside its final place, fsynced and renamed, and its
`manifest.json` holds the size and blake2b digest of every file. Tensors are stored as safetensors, everything
else as JSON or plain text; nothing is ever unpickled.

Weights use the circuit-tracer directory layout for cross-layer transcoders, plus sidecar files of ours that
other loaders ignore. circuit-tracer runs a model without thresholds as plain ReLU, not as TopK: a TopK CLT
needs a calibrated threshold before its results there mean anything.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.storage.safetensors_stream import TensorFiles, save_file, stored_names

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

# (site, name in memory) -> (file, name in the file): "mlp.3.b_enc" is b_enc_3 in W_enc_3.safetensors.
_LAYOUT = {
    ("mlp", "W_enc"): ("W_enc", "W_enc"),
    ("mlp", "b_enc"): ("W_enc", "b_enc"),
    ("mlp", "b_dec"): ("W_enc", "b_dec"),
    ("mlp", "W_dec"): ("W_dec", "W_dec"),
    ("mlp", "connections"): ("connections", "connections"),
    ("mlp", "V"): ("connections", "V"),
    ("mlp", "logits"): ("connections", "logits"),
    ("attn", "W_enc"): ("attn", "W_enc_attn"),
    ("attn", "b_enc"): ("attn", "b_enc_attn"),
    ("attn", "W_dec"): ("attn", "W_dec_attn"),
    ("attn", "b_dec"): ("attn", "b_dec_attn"),
    ("attn", "connections"): ("attn_connections", "connections_attn"),
    ("attn", "V"): ("attn_connections", "V_attn"),
    ("attn", "logits"): ("attn_connections", "logits_attn"),
    ("attn", "W_V"): ("attn_model", "W_V"),
    ("attn", "W_O"): ("attn_model", "W_O"),
    ("attn", "bias"): ("attn_model", "bias"),
}
_IN_MEMORY = {on_disk: in_memory for in_memory, on_disk in _LAYOUT.items()}
_REQUIRED = ("W_enc", "b_enc", "W_dec", "b_dec")
_KEY = re.compile(r"(mlp|attn)\.(0|[1-9]\d*)\.(\w+)")
_ON_DISK = re.compile(r"(\w+)_(0|[1-9]\d*)")
_STEP = re.compile(r"step_(\d+)(\.old)?")


class CheckpointError(ValueError):
    """A checkpoint on disk is missing, incomplete, damaged or of a newer format."""


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory `<path>.tmp` that becomes `path` as a whole, or not at all.

    On a clean exit the manifest is written, everything is fsynced, and the directory is renamed to `path`.
    An existing `path` is first renamed to `<path>.old` and removed last, so a crash at any moment leaves the
    old or the new checkpoint complete. If it falls between the two renames, `path` is absent and the old one
    is `<path>.old`: `verify`, `load_clt`, `load_state` and `latest` read that in its place, and the next
    `atomic_directory(path)` puts it back. On an exception the temporary directory is removed and `path` is
    left as it was. One writer at a time: what a killed writer left in `<path>.tmp` is removed by the next.
    Raises ValueError if `path` is a file.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise ValueError(f"path must be a directory or absent, but {path} is a file: choose another path")
    temporary, old = path.with_name(f"{path.name}.tmp"), path.with_name(f"{path.name}.old")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, path)
    temporary.mkdir()
    try:
        yield temporary
        _write_manifest(temporary)
        _fsync_tree(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _fsync(path.parent)
    if old.exists():
        shutil.rmtree(old)


def verify(path: str | Path) -> None:
    """Check every file of a checkpoint against its manifest; files that it does not list are ignored.

    Raises CheckpointError, naming the file, if `path` is not a directory, the manifest is missing or damaged,
    or a file is missing, has another size (truncated) or another digest (changed bytes).
    """
    _verified_files(_find(Path(path)))


def save_clt(directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a CLT's weights and configuration into `directory`, which is best one from `atomic_directory`.

    tensors: flat, with keys "mlp.{l}.NAME" and "attn.{l}.NAME". NAME is W_enc [F, D], b_enc [F], b_dec [D],
        W_dec ([F, L-l, D] for mlp, [F, D] for attn), and optionally connections [F, C] int32, V [F, C] and
        logits [F, C]; for attn also the model's own W_V, W_O and bias. mlp layers must be 0..L-1.
        Written a piece at a time: never a copy of a whole tensor.
    config: JSON values, with a "model_name"; tuples come back as lists.

    The files are circuit-tracer's (`config.yaml`, `W_enc_{l}`, `W_dec_{l}`) and our sidecars (`attn_{l}`,
    `connections_{l}`, `attn_connections_{l}`, `attn_model_{l}`, `sparseclt.json`). circuit-tracer reads a CLT
    without thresholds as plain ReLU: a TopK CLT needs a calibrated threshold there.
    Raises ValueError or TypeError for tensors or a config other than these.
    """
    if not isinstance(config.get("model_name"), str):
        raise ValueError(f'config["model_name"] must be the model\'s name, got {config.get("model_name")!r}')
    if "format_version" in config:
        raise ValueError('config must not have the key "format_version", save_clt writes its own: remove it')
    directory = Path(directory)
    files = _group_by_file(tensors)
    _write_json(directory / "sparseclt.json", {"format_version": FORMAT_VERSION, **config}, "config")
    (directory / "config.yaml").write_text(
        "# Without threshold tensors circuit-tracer runs this model as plain ReLU.\n"
        "# If it was trained with TopK, add a calibrated threshold first.\n"
        "model_kind: cross_layer_transcoder\n"
        f"model_name: {json.dumps(config['model_name'])}\n"
        'feature_input_hook: "ln2.hook_normalized"\n'
        'feature_output_hook: "hook_mlp_out"\n',
        encoding="utf-8",
    )
    for file, named_tensors in files.items():
        save_file(named_tensors, directory / file)


def load_clt(path: str | Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Verify a CLT directory and read back (config, tensors) as given to `save_clt`, each tensor read, onto the CPU,
    when it is asked for.

    Raises CheckpointError for a missing or damaged file, a newer format version, or an unknown tensor.
    """
    path = _find(Path(path))
    files = _verified_files(path)
    config = _read_versioned(path, files, "sparseclt.json")
    places = {}
    for file in files:
        match = _ON_DISK.fullmatch(file.removesuffix(".safetensors"))
        if not match or match[1] not in {stem for stem, _ in _IN_MEMORY}:
            continue
        stem, layer = match.groups()
        for stored in stored_names(path / file):
            in_memory = _IN_MEMORY.get((stem, stored.removesuffix(f"_{layer}")))
            if in_memory is None or not stored.endswith(f"_{layer}"):
                raise CheckpointError(f"{path / file}: unknown tensor {stored!r} for layer {layer}")
            places[f"{in_memory[0]}.{layer}.{in_memory[1]}"] = path / file, stored
    return config, TensorFiles(places)


def save_state(directory: str | Path, tensors: Mapping[str, Tensor], numbers: Mapping[str, int | float | str]) -> None:
    """Write training state, `state.safetensors` and `state.json`, into a directory from `atomic_directory`.

    Both come back exactly: tensors bit for bit, floats because JSON keeps Python's shortest exact form.
    Raises TypeError for other values, ValueError for NaN and infinities, which JSON lacks.
    """
    for name, value in numbers.items():
        if not isinstance(value, (int, float, str)):
            raise TypeError(f"numbers[{name!r}] must be an int, a float or a str, got {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"numbers[{name!r}] must be finite, got {value}: store it in a tensor")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor)
    directory = Path(directory)
    state = {"format_version": FORMAT_VERSION, "numbers": dict(numbers)}
    _write_json(directory / "state.json", state, "numbers")
    save_file(tensors, directory / "state.safetensors")


def load_state(path: str | Path) -> tuple[Mapping[str, Tensor], dict[str, int | float | str]]:
    """Verify a checkpoint and read back (tensors, numbers) as given to `save_state`, each tensor read, onto the CPU,
    when it is asked for.

    Raises CheckpointError for a missing or damaged file or a newer format version.
    """
    path = _find(Path(path))
    files = _verified_files(path)
    numbers = _read_versioned(path, files, "state.json")["numbers"]
    file = path / "state.safetensors"
    return TensorFiles({name: (file, name) for name in stored_names(file)}), numbers


def latest(run: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in `run/checkpoints/step_%08d`, or None.

    Half-written directories (`.tmp`, or without a manifest) are skipped. A `.old` directory counts only where
    a crash left no other of its step, see `atomic_directory`.
    """
    directories = (Path(run) / "checkpoints").glob("step_*")
    complete: dict[int, Path] = {}
    for directory in sorted(directories, key=lambda directory: directory.suffix != ".old"):
        match = _STEP.fullmatch(directory.name)
        if match and (directory / MANIFEST).is_file():
            complete[int(match[1])] = directory
    return complete[max(complete)] if complete else None


def _find(path: Path) -> Path:
    """Where the checkpoint really is: `path`, or `<path>.old` after a crash between the two renames."""
    path = path.resolve()
    old = path.with_name(f"{path.name}.old")
    return old if not path.exists() and old.is_dir() else path


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _listing_digest(files: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _write_manifest(directory: Path) -> None:
    files = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "blake2b": _digest(file)}
        for file in sorted(directory.rglob("*"))
        if file.is_file()
    }
    # The listing has a digest too: a byte flipped in a file's name must not make that file go unchecked.
    _write_json(directory / MANIFEST, {"files": files, "blake2b": _listing_digest(files)}, "manifest")


def _verified_files(path: Path) -> list[str]:
    """The files that the manifest lists, after checking each of them."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: expected a checkpoint directory")
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{manifest} is missing: the checkpoint is incomplete, use another one")
    try:
        content = json.loads(manifest.read_bytes())
        files, expected = content["files"], content["blake2b"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is damaged ({error}): use another checkpoint") from error
    if _listing_digest(files) != expected:
        raise CheckpointError(f"{manifest} is damaged (its own digest differs): use another checkpoint")
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: restore it or use another checkpoint")
        size = file.stat().st_size
        if size != entry["size"]:
            expected = entry["size"]
            raise CheckpointError(f"{file} has {size} bytes, expected {expected}: use another checkpoint")
        if _digest(file) != entry["blake2b"]:
            raise CheckpointError(f"{file} has changed bytes (its digest differs): use another checkpoint")
    return list(files)


def _group_by_file(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Check the tensors of a CLT and sort them into {file name: {name in the file: tensor}}."""
    files: dict[str, dict[str, Tensor]] = {}
    modules: dict[tuple[str, int], set[str]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or (match[1], match[3]) not in _LAYOUT:
            known = ", ".join(f"{site}.{{l}}.{name}" for site, name in _LAYOUT)
            raise ValueError(f"tensors has the unknown key {key!r}, expected one of {known}")
        _check_tensor(key, tensor)
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
        if len(shape) != 3 or shape[1] != len(layers) - layer:
            expected = f"[F, {len(layers) - layer}, D]"
            raise ValueError(f"tensors['mlp.{layer}.W_dec'] must be {expected} (L - l targets), got {shape}")
    return files


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensors[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}")


def _write_json(file: Path, content: Mapping[str, Any], argument: str) -> None:
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument} must hold plain JSON values only: {error}") from error
    file.write_text(text + "\n", encoding="utf-8")


def _read_versioned(path: Path, files: list[str], name: str) -> dict[str, Any]:
    """The content of one of our JSON files without its format version, which must not be newer than ours."""
    if name not in files:
        raise CheckpointError(f"{path / name} is not part of this checkpoint: expected one that holds it")
    content: dict[str, Any] = json.loads((path / name).read_bytes())
    version = content.pop("format_version")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path / name} has format version {version}, but this sparseclt reads versions up to "
            f"{FORMAT_VERSION}: upgrade sparseclt"
        )
    return content


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _fsync(path)
