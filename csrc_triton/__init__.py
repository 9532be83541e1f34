"""Triton kernels and their launchers, one file per op.

Needs only torch and triton and imports nothing else, so the folder can be copied into another codebase as it is.
Each op's module has `forward`, and `backward` if the op has a gradient of its own; most are built from the products
in `rows` and the sort in `transpose`. Where a launcher takes `scratch_bytes`, `SCRATCH_BYTES` is a good value.
"""

from . import (
    batchtopk_encode,
    connected_encode,
    decoder_gradient,
    jumprelu_encode,
    rows,
    select_connections,
    sparse_decode,
    topk_encode,
    transpose,
    virtual_matmul,
    virtual_weights,
)
from .launch import SCRATCH_BYTES

__all__ = [
    "SCRATCH_BYTES",
    "batchtopk_encode",
    "connected_encode",
    "decoder_gradient",
    "jumprelu_encode",
    "rows",
    "select_connections",
    "sparse_decode",
    "topk_encode",
    "transpose",
    "virtual_matmul",
    "virtual_weights",
]
