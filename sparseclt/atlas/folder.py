"""The files of an atlas: JSON, gzipped, with numbers of seven significant digits."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = 7


def rounded(values: NDArray[Any]) -> Any:
    """Nested lists of `values` with DIGITS significant digits; what is not finite becomes None."""
    values = np.asarray(values, dtype=np.float64)
    size = np.floor(np.log10(np.abs(values), where=values != 0, out=np.zeros_like(values)))
    factor = 10.0 ** np.clip(DIGITS - 1 - size, -300, 300)
    short = np.where(np.abs(values) < 1e-200, 0.0, np.round(values * factor) / factor)
    return short.tolist() if np.isfinite(short).all() else finite(short.tolist())


def finite(content: Any) -> Any:
    """`content` with None for every NaN and infinity, which JSON does not have."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not np.isfinite(content) else content


def write(file: Path, content: Any) -> None:
    """Write `content` as gzipped JSON; the same content gives the same bytes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, allow_nan=False, separators=(",", ":"), ensure_ascii=False)
    file.write_bytes(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0))


def read(file: Path) -> Any:
    """The reverse of `write`."""
    return json.loads(gzip.decompress(file.read_bytes()))
