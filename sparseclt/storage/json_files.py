"""JSON files that may come from anybody: read without surprises, written whole or not at all."""

import json
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LARGEST = 64 << 20  # bytes


class CheckpointError(ValueError):
    """A file or directory on disk is missing, incomplete, damaged or of another format."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the operating system name `path`: those of a write or an fsync would not name any file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_json(file: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises CheckpointError, naming the file and the place in it, for anything else: other encodings than UTF-8, a key
    that comes twice (readers differ in which of them they take), a list or a number where an object was expected, NaN,
    nesting deeper than Python's stack, more than 64 MiB.
    """
    file = Path(file)
    with naming(file), file.open("rb") as stream:
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise CheckpointError(f"{file} is longer than {LARGEST >> 20} MiB: expected a JSON file of ours")
    return parse_object(content, file)


def parse_object(content: bytes, file: Path) -> dict[str, Any]:
    """The JSON object in `content`, which was read from `file`; the errors are those of `read_json`."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}): expected a JSON object in UTF-8") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is damaged: expected a JSON object, got a value of type {type(value).__name__}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {reprlib.repr(key)} comes twice")
        values[key] = value
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def write_json(file: Path, content: Mapping[str, Any], argument: str) -> None:
    """Write a JSON file. Raises TypeError or ValueError, naming `argument`, for values that JSON lacks."""
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument} must hold plain JSON values only: {error}") from error
    write_text(file, text + "\n")


def write_text(file: Path, text: str) -> None:
    """Write `text` in UTF-8."""
    with naming(file):
        file.write_text(text, encoding="utf-8")


def replace_json(path: str | Path, content: object) -> None:
    """`replace_file` with indented JSON."""
    replace_file(path, json.dumps(content, indent=2) + "\n")


def replace_file(path: str | Path, text: str) -> None:
    """Write `text` in UTF-8 to the file `path`, which after a crash at any moment is the old or the new one as a whole.

    On an error the old file stays as it was. One writer at a time.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write_text(temporary, text)
        fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error says what is wrong
            temporary.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Have a file's content, or a directory's entries, on the disk."""
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
