"""A language model and its tokenizer as older versions of transformers and TransformerLens read them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparseclt.language_model.files import load_hf, locate
from sparseclt.language_model.language_model import LanguageModel


def save_language_model(language_model: LanguageModel, directory: Path) -> None:
    """Write the model that `language_model` was loaded from, in its dtype, and its tokenizer to a new `directory`.

    transformers 5 names some things anew; the files have the names of transformers 4 as well. Raises ValueError for a
    model that is not loaded by name, and for a tokenizer that is not made of one tokenizer.json.
    """
    name = language_model.shape.name
    if not name:
        raise ValueError("language_model: expected one loaded by its name or path, got one built in Python")
    path = locate(name)
    if path is None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(name, dtype=language_model.dtype)
    else:
        model, _ = load_hf(path, language_model.dtype)
    with _without_progress_bar():
        model.save_pretrained(directory)
    language_model.tokenizer.save_pretrained(directory)
    if not (directory / "tokenizer.json").is_file():
        raise ValueError(f"model.path: expected a tokenizer that is one tokenizer.json, which that of {name!r} is not")
    _edit(directory / "config.json", _older_config)
    _edit(directory / "tokenizer_config.json", _older_tokenizer)


@contextmanager
def _without_progress_bar() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _edit(file: Path, change: Any) -> None:
    file.write_text(json.dumps(change(json.loads(file.read_text())), indent=2) + "\n")


def _older_config(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with the fields of transformers 4 and those that TransformerLens asks for."""
    older: dict[str, Any] = {"torch_dtype": config.get("dtype")}
    if config["model_type"] == "gpt2":
        older["n_ctx"] = config["n_positions"]
    rope = config.get("rope_parameters")
    if rope and "rope_theta" in rope:
        older["rope_theta"] = older["rotary_emb_base"] = rope["rope_theta"]
        share = rope.get("partial_rotary_factor")
        if share is not None:
            older["partial_rotary_factor"] = older["rotary_pct"] = share
        rest = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        older["rope_scaling"] = None if rest.get("rope_type", "default") == "default" else rest
    return older | config


def _older_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """`config` for the class that runs tokenizer.json as it is."""
    config = {k: v for k, v in config.items() if k != "backend"} | {"tokenizer_class": "PreTrainedTokenizerFast"}
    special = config.get("extra_special_tokens")
    if isinstance(special, list):
        del config["extra_special_tokens"]
        config["additional_special_tokens"] = special
    return config
