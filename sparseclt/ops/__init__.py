"""Sparse operations of a sparsely-connected cross-layer transcoder, each with an obvious reference.

Letters in shapes: N tokens, D d_model, F latents, K active latents, C connections, U upstream latents, S slots of a
row, T targets, H heads; in `attention_encode`, B sequences of S tokens with A active upstream latents each. In
`indices` and `connections`, -1 is an empty slot: worth zero and without gradient.
"""

from sparseclt.ops.attention_encode import attention_encode
from sparseclt.ops.backend import backends
from sparseclt.ops.batchtopk_encode import batchtopk_encode
from sparseclt.ops.connected_encode import connected_encode
from sparseclt.ops.connections import Connections
from sparseclt.ops.jumprelu_encode import jumprelu_encode
from sparseclt.ops.ragged import pad_rows, unpad_rows
from sparseclt.ops.select_connections import select_connections
from sparseclt.ops.sparse_decode import sparse_decode
from sparseclt.ops.topk_encode import topk_encode
from sparseclt.ops.virtual_matmul import virtual_matmul
from sparseclt.ops.virtual_weights import virtual_weights

__all__ = [
    "Connections",
    "attention_encode",
    "backends",
    "batchtopk_encode",
    "connected_encode",
    "jumprelu_encode",
    "pad_rows",
    "select_connections",
    "sparse_decode",
    "topk_encode",
    "unpad_rows",
    "virtual_matmul",
    "virtual_weights",
]
