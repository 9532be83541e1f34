"""Directories on disk that survive a crash and notice a flipped byte.

Such a directory is written beside its final place, fsynced and renamed, and its `manifest.json` holds the size and
blake2b digest of every file. Everything but tensors is JSON or plain text; nothing is ever unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint on disk is missing, incomplete, damaged or of another format."""


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
    verified(path)


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
    write_json(directory / MANIFEST, {"files": files, "blake2b": _listing_digest(files)}, "manifest")


def verified(path: str | Path) -> tuple[Path, list[str]]:
    """Where the directory really is (see `atomic_directory`), and the files that its manifest lists, each checked.

    Raises CheckpointError as `verify` does.
    """
    path = _find(Path(path))
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
    return path, list(files)


def write_json(file: Path, content: Mapping[str, Any], argument: str) -> None:
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{argument} must hold plain JSON values only: {error}") from error
    file.write_text(text + "\n", encoding="utf-8")


def read_versioned(path: Path, files: list[str], name: str) -> dict[str, Any]:
    """The content of one of our JSON files without its format version, which must be ours."""
    if name not in files:
        raise CheckpointError(f"{path / name} is not part of this checkpoint: expected one that holds it")
    content: dict[str, Any] = json.loads((path / name).read_bytes())
    version = content.pop("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / name} has format version {version}, expected {FORMAT_VERSION}: "
            "read it with the version of sparseclt that wrote it"
        )
    return content


def replace_file(path: Path, text: str) -> None:
    """Write a whole new file in the place of `path`: a crash leaves the old content or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        _fsync(path)
