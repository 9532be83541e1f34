"""Where a model given by name lies on disk, and reading it with transformers."""

import os
import re
import textwrap
from pathlib import Path
from typing import Any, Literal

import torch

DType = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXPECTED = "'embedded', an existing local path or a model on the Hugging Face hub"
FILE_SUFFIXES = (".gguf", ".txt", ".json", ".jsonl", ".gz", ".zst", ".parquet")


def looks_like_path(name: str) -> bool:
    """Whether a name can only mean a local path: hub names are NAME or OWNER/NAME.

    OWNER/NAME counts as a path if a local directory OWNER exists.
    """
    if name.startswith((".", "~", "/")) or name.endswith(FILE_SUFFIXES):
        return True
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return any(separator in name for separator in {"/", os.sep})
    return "/" in name and Path(name).parent.is_dir()


def locate(name_or_path: str | Path) -> Path | None:
    """The directory or .gguf file of a local model ("embedded": the shipped one); None for a name on the hub.

    Raises ValueError for a path that does not exist or holds no model.
    """
    if name_or_path == "embedded":
        from sparseclt import embedded

        return embedded.model_directory()
    path = Path(name_or_path).expanduser()
    if not path.exists():
        if isinstance(name_or_path, Path) or looks_like_path(name_or_path):
            raise ValueError(f"model.path: expected {EXPECTED}, got {str(name_or_path)!r}, which does not exist")
        return None
    if path.is_file():
        if path.suffix != ".gguf":
            raise ValueError(f"model.path: expected a directory or a .gguf file, got {str(path)!r}")
        return path
    if (path / "config.json").exists():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "neither"
        raise ValueError(
            f"model.path: expected a directory with config.json or one .gguf file, "
            f"found {found} in {str(path)!r}" + ("; give the path of one of them" if files else "")
        )
    return files[0]


def load_hf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Model, in `dtype`, and tokenizer of a directory written by `save_pretrained`, or of a .gguf file.

    Code that lies beside a model is never run. Raises ValueError, naming `path`, for files that cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    # Without an answer transformers asks on a terminal whether to run Python files that lie beside a model.
    extra: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    folder = path
    if path.is_file():
        folder, extra["gguf_file"] = path.parent, path.name
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar of its own would stand between ours
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **extra)
        return model, AutoTokenizer.from_pretrained(folder, **extra)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # of any kind: what readers of damaged files raise is not documented
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"model.path: expected a model that transformers can read in {path}, got {reason}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
