"""Training state on disk: tensors as safetensors, numbers as JSON, in directories that survive a crash."""

import math
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparseclt.parallel import ALONE, Group
from sparseclt.storage.directories import (
    FORMAT_VERSION,
    MANIFEST,
    CheckpointError,
    read_versioned,
    remove_directory,
    remove_tree,
    verified,
)
from sparseclt.storage.json_files import write_json
from sparseclt.storage.parts import Part
from sparseclt.storage.safetensors_stream import TensorFiles, check_tensor, save_file, stored_names

_STEP = re.compile(r"step_(\d+)(\.old)?")


def save_state(
    directory: str | Path,
    tensors: Mapping[str, Tensor | Part],
    numbers: Mapping[str, int | float | str],
    group: Group = ALONE,
) -> None:
    """Write training state, `state.safetensors` and `state.json`, into a directory from `atomic_directory`.

    Both come back exactly: tensors bit for bit, floats because JSON keeps Python's shortest exact form. The ranks of a
    `group` write them together, each its share of the tensors that are a `Part`.
    Raises TypeError for other values, ValueError for NaN and infinities, which JSON lacks.
    """
    for name, value in numbers.items():
        if not isinstance(value, (int, float, str)):
            raise TypeError(f"numbers[{name!r}] must be an int, a float or a str, got {type(value).__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"numbers[{name!r}] must be finite, got {value}: store it in a tensor")
    for name, tensor in tensors.items():
        check_tensor(name, tensor)
    directory = Path(directory)
    state = {"format_version": FORMAT_VERSION, "numbers": dict(numbers)}
    if group.rank == 0:
        write_json(directory / "state.json", state, "numbers")
    save_file(tensors, directory / "state.safetensors", group)


def load_state(path: str | Path) -> tuple[TensorFiles, dict[str, int | float | str]]:
    """Verify a checkpoint and read back (tensors, numbers) as given to `save_state`, each tensor read, onto the CPU,
    when it is asked for.

    Raises CheckpointError for a missing or damaged file or a newer format version.
    """
    path, files = verified(path)
    numbers = read_versioned(path, files, "state.json").get("numbers")
    if not isinstance(numbers, dict) or not all(_is_number(value) for value in numbers.values()):
        raise CheckpointError(f"{path / 'state.json'} is damaged: expected numbers and text by name below 'numbers'")
    file = path / "state.safetensors"
    if file.name not in files:
        raise CheckpointError(f"{file} is not part of this checkpoint: expected one that holds it")
    return TensorFiles({name: (file, name) for name in stored_names(file)}), numbers


def _is_number(value: object) -> bool:
    return isinstance(value, (int, str)) or isinstance(value, float) and math.isfinite(value)


def whole_number(path: Path, numbers: Mapping[str, int | float | str], name: str, least: int) -> int:
    """`numbers[name]` of the checkpoint in directory `path`. Raises CheckpointError for anything but a whole number."""
    value = numbers.get(name)
    if type(value) is not int or value < least:
        raise CheckpointError(
            f"{path / 'state.json'}: expected {name}, a whole number of at least {least}, got {reprlib.repr(value)}"
        )
    return value


def latest(run: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in `run/checkpoints/step_%08d`, or None.

    Half-written directories (`.tmp`, or without a manifest) are skipped. A `.old` directory counts only where
    a crash left no other of its step, see `atomic_directory`.
    """
    complete = _complete(run)
    return complete[max(complete)] if complete else None


def prune(run: str | Path, keep: int) -> None:
    """Remove all complete checkpoints but the `keep` newest, and what a crash left of others."""
    complete = _complete(run)
    for step in sorted(complete)[:-keep]:
        remove_directory(complete[step])
    for directory in (Path(run) / "checkpoints").glob("step_*.tmp"):
        remove_tree(directory)


def _complete(run: str | Path) -> dict[int, Path]:
    """Complete checkpoints by step."""
    directories = (Path(run) / "checkpoints").glob("step_*")
    complete: dict[int, Path] = {}
    for directory in sorted(directories, key=lambda directory: directory.suffix != ".old"):
        match = _STEP.fullmatch(directory.name)
        if match and (directory / MANIFEST).is_file():
            complete[int(match[1])] = directory
    return complete
