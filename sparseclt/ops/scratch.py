"""Default bounds on the working memory of the ops. They are set here and nowhere else."""

SCRATCH_BYTES = {
    "torch": 4 << 20,  # about what stays in a core's cache
    "numba": 1 << 20,  # what stays in a core's second-level cache
    "triton": 64 << 20,  # of GPU memory: enough to keep the GPU busy
}
SELECTION_BYTES = 32 << 20  # scores of `select_connections` on the torch backend: rows are as long as U
ATTENTION_BYTES = 16 << 20  # pre-activations of `attention_encode` on every backend: at least one sequence is alive


def default_scratch(op: str, backend: str) -> int:
    """Bytes of scratch that `op` takes on `backend` unless it is told otherwise."""
    if op == "attention_encode":
        return ATTENTION_BYTES
    if op == "select_connections" and backend == "torch":
        return SELECTION_BYTES
    return SCRATCH_BYTES.get(backend, SCRATCH_BYTES["torch"])
