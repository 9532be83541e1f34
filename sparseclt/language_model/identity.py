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
    """blake2b, in hex, of all that decides which tokens a text becomes; that of "none" without a tokenizer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None:
        content: Any = "none"
    elif backend is not None:
        # Truncation and padding are what the last call asked for, not part of the tokenizer.
        content = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
    else:
        content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    ends = [getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
    return hashlib.blake2b(json.dumps([content, ends], sort_keys=True).encode()).hexdigest()
