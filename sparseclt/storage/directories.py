"""Directories on disk that survive a crash and notice a flipped byte.

Such a directory is written beside its final place, fsynced and renamed, and its `manifest.json` holds the size and
blake2b digest of every file. Everything but tensors is JSON or plain text; nothing is ever unpickled.
"""

import hashlib
import json
import os
import reprlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparseclt.storage.json_files import CheckpointError, fsync, naming, read_json, write_json

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "CheckpointError",
    "atomic_directory",
    "check_regular",
    "remove_directory",
    "verify",
]

FORMAT_VERSION = 2
MANIFEST = "manifest.json"


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yield a temporary directory `<path>.tmp` that becomes `path` as a whole, or not at all.

    On a clean exit the manifest is written, everything is fsynced, and the directory is renamed to `path`.
    An existing `path` is first renamed to `<path>.old` and removed last, so a crash at any moment leaves the
    old or the new checkpoint complete. If it falls between the two renames, `path` is absent and the old one
    is `<path>.old`: `verify`, `load_clt`, `load_state` and `latest` read that in its place, and the next
    `atomic_directory(path)` puts it back. On an exception the temporary directory is removed and `path` is
    left as it was. One writer at a time: what a killed writer left in `<path>.tmp` is removed by the next.
    Raises ValueError, before anything is written, if `path` is a file, a mount point, or a directory of files that
    were not written this way, which would be lost; OSError, naming the file, if the disk refuses something.
    """
    path = Path(path).resolve()
    _check_replaceable(path)
    temporary, old = _temporary(path), _old(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists():
            if path.exists():
                remove_tree(old)
            else:
                os.rename(old, path)
        temporary.mkdir()
    try:
        with naming(temporary):
            yield temporary
            _write_manifest(temporary)
            _fsync_tree(temporary)
            if path.exists():
                os.rename(path, old)
            os.rename(temporary, path)
    except BaseException:
        with suppress(OSError):  # the first error says what is wrong; readers find the old one where it is
            if old.exists() and not path.exists():
                os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(path.parent)
    if old.exists():
        remove_tree(old)


def remove_directory(path: str | Path) -> None:
    """Remove what `atomic_directory` wrote; a crash halfway leaves nothing that passes for a checkpoint."""
    path = Path(path).resolve()
    temporary, old = _temporary(path), _old(path)
    shutil.rmtree(temporary, ignore_errors=True)
    if path.exists() and old.exists():
        remove_tree(old)
    os.rename(_find(path), temporary)
    remove_tree(temporary)


def remove_tree(directory: Path) -> None:
    """`shutil.rmtree`, whose errors name files without the directory that they lie in (up to Python 3.12)."""
    try:
        shutil.rmtree(directory)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(directory)) from error


def _temporary(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp")


def _old(path: Path) -> Path:
    return path.with_name(f"{path.name}.old")


def _check_replaceable(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f"path must be a directory or absent, but {path} is a file: choose another path")
    if os.path.ismount(path):
        raise ValueError(f"{path} is a mount point, which nothing can be renamed to: choose a directory inside it")
    if path.is_dir() and not (path / MANIFEST).exists() and any(path.iterdir()):
        raise ValueError(
            f"{path} holds files, but no {MANIFEST}: expected an absent or empty directory, or one that was written "
            f"here before, because all in it is replaced; choose another path"
        )


def verify(path: str | Path) -> None:
    """Check every file of a checkpoint against its manifest; files that it does not list are ignored.

    Raises CheckpointError, naming the file, if `path` is not a directory, the manifest is missing or damaged,
    or a file is missing, has another size (truncated) or another digest (changed bytes).
    """
    verified(path)


def _find(path: Path) -> Path:
    """Where the checkpoint really is: `path`, or `<path>.old` after a crash between the two renames."""
    path = path.resolve()
    old = _old(path)
    return old if not path.exists() and old.is_dir() else path


def _digest(file: Path) -> str:
    with naming(file), file.open("rb") as stream:
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
    files = _listed(path)
    for name, entry in files.items():
        file = path / name
        check_regular(path, name)
        size = file.stat().st_size
        if size != entry["size"]:
            expected = entry["size"]
            raise CheckpointError(f"{file} has {size} bytes, expected {expected}: use another checkpoint")
        if _digest(file) != entry["blake2b"]:
            raise CheckpointError(f"{file} has changed bytes (its digest differs): use another checkpoint")
    return path, list(files)


def _listed(path: Path) -> dict[str, dict[str, Any]]:
    """What the manifest says of each file, in the types that it must have."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{manifest} is missing: the checkpoint is incomplete, use another one")
    check_regular(path, MANIFEST)
    content = read_json(manifest)
    files = content.get("files")
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise CheckpointError(f"{manifest} is damaged: expected a size and a blake2b for each of its files")
    if _listing_digest(files) != content.get("blake2b"):
        raise CheckpointError(f"{manifest} is damaged (its own digest differs): use another checkpoint")
    for name in files:
        if not _is_name(name):
            raise CheckpointError(f"{manifest} lists {reprlib.repr(name)}: expected files below {path}, not itself")
    return files


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and type(entry.get("size")) is int and isinstance(entry.get("blake2b"), str)


def _is_name(name: str) -> bool:
    """Whether a manifest may list `name`: a relative path that stays below the directory and fits a file system."""
    parts = name.split("/")
    stays = name != MANIFEST and not {"", ".", ".."} & set(parts) and "\\" not in name
    return stays and name.isprintable() and len(name) <= 1024 and all(len(part.encode()) <= 255 for part in parts)


def check_regular(path: Path, name: str) -> None:
    """Refuse links, which may leave the directory, and everything that is no file, such as a pipe."""
    place = path
    for part in name.split("/"):
        place = place / part
        if place.is_symlink() and not _is_blob_of_the_hub(place):
            raise CheckpointError(f"{place} is a symbolic link: expected a file of the checkpoint, copy it in")
    if not place.is_file():
        raise CheckpointError(f"{place} is missing: restore it or use another checkpoint")


def _is_blob_of_the_hub(link: Path) -> bool:
    """Whether a link in REPOSITORY/snapshots/REVISION of the hub's cache leads to a file in REPOSITORY/blobs."""
    snapshots = [parent for parent in link.parents if parent.name == "snapshots"]
    return any(link.resolve().parent == parent.with_name("blobs") for parent in snapshots)


def read_versioned(path: Path, files: list[str], name: str) -> dict[str, Any]:
    """The content of one of our JSON files without its format version, which must be ours."""
    if name not in files:
        raise CheckpointError(f"{path / name} is not part of this checkpoint: expected one that holds it")
    content = read_json(path / name)
    version = content.pop("format_version", None)
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path / name} has format version {reprlib.repr(version)}, expected {FORMAT_VERSION}: "
            "read it with the version of sparseclt that wrote it"
        )
    return content


def _fsync_tree(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        fsync(path)
