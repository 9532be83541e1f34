"""The working memory of the ops."""

from sparseclt.costs import FLOAT, POSITION
from sparseclt.ops.scratch import GPU_PARTS_BYTES, GPU_READ_BYTES, GPU_SHARE, SCRATCH_BYTES, default_scratch
from sparseclt.training.run_sizes import NOTED, MemoryTerm, RunSizes


def scratch_bytes(x: RunSizes, op: str, all_scores: int) -> int:
    """What `op` takes at most for scores that would be so many bytes. On a GPU, of what is available at the start: a
    step has less free."""
    if not x.on_gpu:
        return min(default_scratch(op, "torch"), all_scores)
    share = SCRATCH_BYTES["triton"] if x.available is None else int(GPU_SHARE * x.available)
    return min(max(SCRATCH_BYTES["triton"], share), all_scores)


def scratch_terms(x: RunSizes) -> list[MemoryTerm]:
    """The ops of the passes and of the update."""
    encode = scratch_bytes(x, "topk_encode", FLOAT * x.n * x.F)
    terms = [MemoryTerm("scratch of an op", encode, ("forward",), "at most 4 MiB on a CPU, 1/32 of a free GPU; 4 n F")]
    if not x.on_gpu:
        return terms
    C = max(x.connections, default=0) * x.sparse
    read = min(GPU_READ_BYTES, FLOAT * x.n * x.K * C)
    slots = max(x.n * x.K, x.F * C)
    sums = min(GPU_PARTS_BYTES, FLOAT * x.D * slots // 128)  # two parts per 256 slots
    return [
        *terms,
        MemoryTerm("upstream values that connections read", read, ("backward",), "4 n K C, at most 512 MiB"),
        MemoryTerm("partial sums and sorted slots", sums + 4 * POSITION * slots, ("backward", *NOTED),
                   "D / 32 + 16 bytes per slot, n K or F C, at most 256 MiB + 16 n K"),
    ]  # fmt: skip
