"""Default bounds on the working memory of the ops. They are set here, and those of kernels on a GPU, shares of its free
memory, in `csrc_triton`; nowhere else."""

import torch

AUTOMATIC = -1  # a `scratch_bytes` that an operator replaces by the default when it runs: traced code asks no device
SCRATCH_BYTES = {
    "torch": 4 << 20,  # about what stays in a core's cache
    "numba": 1 << 20,  # what stays in a core's second-level cache
    "triton": 64 << 20,  # in the interpreter
}
GPU_SHARE = 1 / 32  # of free memory, on a GPU: that of csrc_triton, known without triton
GPU_PARTS_BYTES, GPU_READ_BYTES = 256 << 20, 512 << 20  # beside it: partial sums, values read by connections; as there
SELECTION_BYTES = 32 << 20  # scores of `select_connections` on the torch backend: rows are as long as U
UPDATE_BYTES = 16 << 20  # a decoder's gradient in the optimiser's step of the numba backend
ATTENTION_BYTES = 16 << 20  # pre-activations of `attention_encode` on every backend: at least one sequence is alive


def default_scratch(op: str, backend: str, device: torch.device | None = None) -> int:
    """Bytes of scratch that `op` takes on `backend` unless it is told otherwise; on a CUDA `device` kernels take a
    share of what is free there."""
    if op == "attention_encode":
        return ATTENTION_BYTES
    if op == "select_connections" and backend == "torch":
        return SELECTION_BYTES
    if backend == "triton" and device is not None and device.type == "cuda":
        from csrc_triton.launch import free_share

        return free_share(device)
    return SCRATCH_BYTES.get(backend, SCRATCH_BYTES["torch"])
