"""The memory that choosing connections takes, at the start of a step."""

from sparseclt.costs import FLOAT, ID
from sparseclt.ops.rows import PAIR_BYTES
from sparseclt.ops.scratch import SELECTION_BYTES
from sparseclt.training.run_sizes import MemoryTerm, RunSizes
from sparseclt.training.scratch_memory import scratch_bytes

TOKEN_SLOT = 40  # bytes of a latent of a recent token: ids and values of both readers and read, and their order


def selection_terms(x: RunSizes) -> list[MemoryTerm]:
    """What is held beside the effective decoders while connections are chosen."""
    if not x.sparse:
        return []
    heads = x.shape.heads if x.config.clt.attention == "latents" else 0
    rows = FLOAT * x.F * x.D * (1 + 2 * heads)
    return [
        MemoryTerm("scores of connections", max(_score_bytes(x, u * x.F) for u in x.readers), ("selection",),
                   "2 x 32 MiB, or 1/32 of a free GPU; co-activation: 40 bytes per recent token and active latent"),
        MemoryTerm("encoder rows that choose", rows, ("selection",), "4 F D; attention: 4 F D (1 + 2 H)"),
        MemoryTerm("connections chosen anew", ID * x.slots, ("selection",), "8 F C per reader"),
    ]  # fmt: skip


def _score_bytes(x: RunSizes, U: int) -> int:
    """Of a reader of U latents: its scores, a few of its F rows at a time, and what they are computed from."""
    scratch = scratch_bytes(x, "select_connections", FLOAT * x.F * U)
    if x.config.connections.importance != "coactivation":
        return scratch
    rows = min(x.F, max(1, SELECTION_BYTES // (FLOAT * U)))
    scores = FLOAT * rows * U
    recent = x.config.connections.recent_tokens * x.K
    pairs = scratch_bytes(x, "add_outer_products_", PAIR_BYTES * recent * x.K)
    return max(2 * scores, scores + TOKEN_SLOT * recent + pairs, scores + scratch)
