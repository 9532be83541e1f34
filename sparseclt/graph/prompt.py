"""From a prompt to the tokens that a graph explains."""

import torch
from torch import Tensor

from sparseclt.language_model.language_model import LanguageModel


def prompt_tokens(language_model: LanguageModel, prompt: str, special_tokens: bool = False) -> Tensor:
    """The tokens [1, S] of `prompt`, after the token that begins a document (BOS, or else EOS).

    Text that spells a special token, such as "<|endoftext|>", is plain text, unless `special_tokens` is True. Raises
    ValueError for a prompt without text, and for one that is longer than the model's context.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: expected a string, got {type(prompt).__name__}")
    if not prompt.strip():
        raise ValueError(f"prompt: expected some text, got {prompt!r}")
    tokenizer = language_model.tokenizer
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("tokenizer: expected one with a BOS or EOS token, to begin the prompt with, got neither")
    ids = tokenizer(prompt, add_special_tokens=False, verbose=False, split_special_tokens=not special_tokens).input_ids
    if ids[:1] != [start] or not special_tokens:
        ids = [start, *ids]
    if len(ids) < 2:
        raise ValueError(f"prompt: expected text behind the token that begins a document, got only that: {prompt!r}")
    context = language_model.shape.context
    if context is not None and len(ids) > context:
        raise ValueError(
            f"prompt: expected at most {context} tokens (the model's context), with the one that begins a document, "
            f"got {len(ids)}; shorten it"
        )
    return torch.tensor([ids])


def token_strings(language_model: LanguageModel, tokens: Tensor) -> list[str]:
    """Each token [k] as text."""
    return [str(language_model.tokenizer.decode([token])) for token in tokens.tolist()]
