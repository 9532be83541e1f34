"""Triton kernels and their launchers, one file an op.

Needs torch and triton alone, and imports only itself: the folder can be copied into another codebase as it stands.
Each module of an op has `forward`, and `backward` where the op has a gradient; `rows` and `transpose` are what most
of them are made of.
"""

from . import (
    connected_encode,
    rows,
    select_connections,
    sparse_decode,
    topk_encode,
    transpose,
    virtual_matmul,
    virtual_weights,
)

__all__ = [
    "connected_encode",
    "rows",
    "select_connections",
    "sparse_decode",
    "topk_encode",
    "transpose",
    "virtual_matmul",
    "virtual_weights",
]
