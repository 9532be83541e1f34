"""Token ids on disk: each text is tokenized once, and its rows are mapped into memory.

An entry of the store is a directory `SETTINGS-TEXT`, named by two digests, with one file of int32 ids per split and
`tokens.json`. It appears whole and never changes, so several processes may use a store at once.
"""

import hashlib
import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.data.tokens import Stored, finish_digest, with_facts
from sparseclt.storage.json_files import fsync, read_json

INFO = "tokens.json"
UNFINISHED = ".unfinished-"
ABANDONED_SECONDS = 86_400  # since an unfinished entry was last written to
CHUNK = 16 << 20  # bytes

Read = list[dict[str, Any]]  # what was read of each file of the text, in order


@dataclass(frozen=True)
class Entry:
    """What an entry holds besides the ids."""

    splits: dict[str, Stored]
    read: Read
    exhausted: bool
    """Whether the text was read to its end."""


class TokenStore:
    """The entries in `directory` that were made with the same settings, the tokenizer's digest among them."""

    def __init__(self, directory: Path, settings: dict[str, Any]):
        self.directory, self.row_tokens = directory, int(settings["row_tokens"])
        self.key = _digest(settings)

    def find(self, unchanged: Callable[[Read, bool], bool]) -> dict[str, Tensor] | None:
        """Rows [R, S] by split, from an entry whose text is `unchanged`; None if there is none.

        A damaged entry is removed, with a warning.
        """
        for path in sorted(self.directory.glob(f"{self.key}-*")):
            try:
                info = read_json(path / INFO)
                entry = Entry({name: Stored(**facts) for name, facts in dict(info.pop("splits")).items()}, **info)
                rows = {name: self._map(path / name, stored) for name, stored in entry.splits.items()}
            except (OSError, ValueError, KeyError, TypeError) as error:
                warnings.warn(f"data.cache: {path} is damaged ({error}); the text is tokenized again", stacklevel=2)
                shutil.rmtree(path, ignore_errors=True)
                continue
            if unchanged(entry.read, entry.exhausted):
                return rows
        return None

    def add(self, write: Callable[[Path], Entry]) -> dict[str, Tensor]:
        """Rows by split, from a new entry: `write` writes a file of ids for each split into the directory given."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.directory))
            try:
                entry = write(unfinished)
                (unfinished / INFO).write_text(json.dumps(asdict(entry), indent=2) + "\n")
                for file in unfinished.iterdir():
                    fsync(file)
                path = self.directory / f"{self.key}-{_digest(entry.read)}"
                try:
                    unfinished.rename(path)
                    fsync(self.directory)
                except OSError:
                    if not path.exists():  # else another process was faster
                        raise
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            return {name: self._map(path / name, stored) for name, stored in entry.splits.items()}
        except OSError as error:
            if error.filename and not _of_the_store(Path(error.filename), self.directory):
                raise  # the text's, which names its file
            raise ValueError(
                f"data.cache: could not write token ids to {self.directory} ({error.strerror}); name another directory "
                f"or make room"
            ) from error

    def _map(self, file: Path, stored: Stored) -> Tensor:
        """Rows [R, S] of a file, whose bytes are checked; they take memory only where they are read."""
        digest = hashlib.blake2b()
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
        if finish_digest(digest, stored.rows, self.row_tokens) != stored.digest:
            raise ValueError(f"the digest of {file.name} differs")
        ids = torch.from_file(str(file), shared=False, size=stored.rows * self.row_tokens, dtype=torch.int32)
        return with_facts(ids.view(stored.rows, self.row_tokens), stored)

    def _remove_abandoned(self) -> None:
        for path in self.directory.glob(f"{UNFINISHED}*"):
            with suppress(FileNotFoundError):  # another process has finished it
                newest = max(file.stat().st_mtime for file in [path, *path.iterdir()])
                if time.time() - newest > ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def _digest(values: Any) -> str:
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()


def _of_the_store(path: Path, directory: Path) -> bool:
    return path.is_relative_to(directory) or directory.is_relative_to(path)
