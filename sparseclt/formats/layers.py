"""The layers that a directory holds, by the names of its files or folders."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparseclt.storage.directories import CheckpointError, check_regular
from sparseclt.storage.json_files import read_json


def numbered(folder: Path, pattern: str) -> list[str]:
    """The names of the files in `folder` that match `pattern`, whose first group is their number: from 0 without gaps.
    Empty: none."""
    found = {int(m[1]): path.name for path in folder.iterdir() if (m := re.fullmatch(pattern, path.name))}
    return in_order(found, folder)


def in_order(found: Mapping[int, str], folder: Path) -> list[str]:
    """The names in the order of their layers. Raises CheckpointError for a layer that is missing."""
    for layer in range(len(found)):
        if layer not in found:
            raise CheckpointError(
                f"{folder} has the layers {sorted(found)}, expected all from 0 on: a SparseCLT covers a model's first "
                "layers without gaps"
            )
    return [found[layer] for layer in range(len(found))]


def folders_with(folder: Path, *files: str) -> list[str]:
    """The names of the folders in `folder` that hold all of `files`."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if all((path / file).exists() for file in files))


def by_layer(layers: Iterable[tuple[int, str]], folder: Path) -> list[str]:
    """Names of folders by their layers. Raises CheckpointError if two are of one layer, or one is missing."""
    found: dict[int, str] = {}
    for layer, name in layers:
        if layer in found:
            raise CheckpointError(f"{folder} has both {found[layer]} and {name} of layer {layer}: keep one of them")
        found[layer] = name
    return in_order(found, folder)


def json_of(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in file `name` of `folder`, which must be no link."""
    check_regular(folder, name)
    return read_json(folder / name)


def expect(place: Path, values: Mapping[str, Any], **allowed: tuple[Any, ...]) -> None:
    """A CheckpointError that names the field and the file `place` if a field of `values` has another value than those
    allowed; an absent one is None."""
    for name, good in allowed.items():
        if values.get(name) not in good:
            raise CheckpointError(
                f"{place}: expected {name} {' or '.join(repr(value) for value in good)}, which a SparseCLT can hold, "
                f"got {values.get(name)!r}"
            )


def the_same(place: Path, name: str, values: Iterable[Any]) -> Any:
    """The one value that `name` has in all layers."""
    found = list(dict.fromkeys(values))
    if len(found) != 1:
        raise CheckpointError(f"{place}: expected one {name} in all layers, got {', '.join(map(repr, found))}")
    return found[0]


def whole(place: Path, values: Mapping[str, Any], name: str) -> int:
    """Field `name`, a whole number of at least 1."""
    if type(value := values.get(name)) is not int or value < 1:
        raise CheckpointError(f"{place}: expected {name} to be a whole number of at least 1, got {value!r}")
    return value
