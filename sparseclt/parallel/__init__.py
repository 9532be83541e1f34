"""Ranks that share the work of one CLT, and the ops that need more of it than a rank holds.

Needs only torch. Of every module a rank of n holds F/n rows of the encoder, with their biases and connections, and D/n
columns of every decoder row. A token's latents are chosen over all rows and are known to all ranks; decoders then need
no exchange: `ops.sparse_decode` of columns gives columns.
"""

from sparseclt.parallel.collectives import all_rows, gather_columns, sum_over, to_columns, to_rows
from sparseclt.parallel.from_first import from_first
from sparseclt.parallel.group import ALONE, Group
from sparseclt.parallel.ranks import ONE_RANK, Ranks
from sparseclt.parallel.topk_encode import strongest, topk_encode
from sparseclt.parallel.virtual_weights import virtual_weights

__all__ = [
    "ALONE",
    "ONE_RANK",
    "Group",
    "Ranks",
    "all_rows",
    "from_first",
    "gather_columns",
    "strongest",
    "sum_over",
    "to_columns",
    "to_rows",
    "topk_encode",
    "virtual_weights",
]
