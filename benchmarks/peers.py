"""Kernels of other projects for the same functions, where they are installed. None is a dependency.

| name | install | op |
| eai-sparsify | pip install eai-sparsify | encoder with gradients over the selected latents, decoder |
| openai | pip install git+https://github.com/openai/sparse_autoencoder (CUDA) | decoder |
"""

from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from types import SimpleNamespace as Inputs
from typing import Any

import torch
from torch import Tensor


def _sparsify_decode(i: Inputs) -> Tensor:
    with redirect_stdout(StringIO()):  # it prints when imported without triton
        from sparsify.utils import decoder_impl, eager_decode

    run = decoder_impl if i.W_dec.device.type == "cuda" else eager_decode
    return run(i.indices, i.values, i.W_dec.mT)


def _sparsify_encode(i: Inputs) -> tuple[Tensor, Tensor]:
    with redirect_stdout(StringIO()):
        from sparsify.fused_encoder import fused_encoder

    values, indices, _ = fused_encoder(i.x, i.W_enc, i.b_enc, i.k, "topk")
    return values, indices


def _openai_decode(i: Inputs) -> Tensor:
    from sparse_autoencoder.kernels import TritonDecoderAutograd

    return TritonDecoderAutograd.apply(i.indices, i.values, i.W_dec.T)


_PEERS: dict[str, dict[str, tuple[str, bool, Callable[[Inputs], Any]]]] = {
    # op -> name -> (package, whether it needs CUDA, function)
    "sparse_decode": {
        "eai-sparsify": ("sparsify", False, _sparsify_decode),
        "openai": ("sparse_autoencoder", True, _openai_decode),
    },
    "topk_encode": {"eai-sparsify": ("sparsify", False, _sparsify_encode)},
}


def peers(op: str) -> dict[str, Callable[[Inputs], Any]]:
    """The peers of an op that can run here."""
    found = {}
    for name, (package, cuda, function) in _PEERS.get(op, {}).items():
        if find_spec(package) is not None and (not cuda or torch.cuda.is_available()):
            found[name] = function
    return found
