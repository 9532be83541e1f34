"""Small texts on disk, in every form that a source may have."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from sparseclt.data.sources import open_source


def compressed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return pyarrow.Codec("zstd").compress(data, asbytes=True) if suffix == ".zst" else data


def write(path: Path, text: str | bytes) -> Path:
    """Text as a file, compressed if its name says so."""
    path.write_bytes(compressed(text if isinstance(text, bytes) else text.encode(), path.suffix))
    return path


def write_jsonl(path: Path, texts: list[Any], field: str = "text") -> Path:
    return write(path, "".join(json.dumps({field: text}) + "\n" for text in texts))


def write_parquet(path: Path, texts: list[Any], field: str = "text") -> Path:
    parquet.write_table(pyarrow.table({"number": range(len(texts)), field: texts}), path)
    return path


def read(source: Any, split: str = "train", field: str = "text") -> list[str]:
    return [passage.text for passage in open_source(str(source), split, field).passages()]
