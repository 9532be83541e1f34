"""The layouts of other tools that `SparseCLT.from_pretrained` reads. Importing this module makes them known to it."""

from pathlib import Path
from types import ModuleType

from sparseclt.formats import circuit_tracer, gemma_scope, saelens, sparsify
from sparseclt.formats.foreign import ForeignCLT
from sparseclt.model import pretrained
from sparseclt.model.clt import SparseCLT

__all__ = ["READERS", "SparseCLT", "open_foreign", "read_foreign"]

READERS: tuple[ModuleType, ...] = (circuit_tracer, gemma_scope, sparsify, saelens)


def open_foreign(path: Path) -> ForeignCLT | None:
    """What directory `path` holds, by the headers of its files; None for an unknown layout. Raises CheckpointError,
    naming the file, for a damaged one and for what a `SparseCLT` cannot hold."""
    reader = next((reader for reader in READERS if path.is_dir() and reader.recognises(path)), None)
    found: ForeignCLT | None = None if reader is None else reader.read(path)
    return found


def read_foreign(path: str | Path) -> ForeignCLT:
    """As `open_foreign`; raises ValueError for an unknown layout."""
    if (found := open_foreign(Path(path))) is None:
        names = ", ".join(reader.NAME for reader in READERS)
        raise ValueError(f"path: expected a directory in one of the formats {names}, got {path}")
    return found


pretrained.OPENERS[:] = [open_foreign]
