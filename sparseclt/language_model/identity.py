"""What a language model and its tokenizer are, whatever their names: digests of weights and of vocabulary."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """blake2b, in hex, of the bytes, shapes and dtypes of tensors in their order."""
    digest = hashlib.blake2b()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """blake2b, in hex, of all that decides which tokens a text becomes; None is the absent tokenizer."""
    facts: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
    if getattr(tokenizer, "is_fast", False):
        # Without what transformers sets anew for each call.
        facts["backend"] = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    elif tokenizer is not None:
        settings = {name: str(value) for name, value in tokenizer.init_kwargs.items() if "path" not in name}
        facts |= {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab(), "settings": settings}
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode()).hexdigest()
