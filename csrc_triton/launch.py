"""Shared by all launchers: launch configurations, the scratch bound, checks of tensors, small arithmetic."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

SCRATCH_BYTES = 64 << 20  # a `scratch_bytes` for small GPUs and the interpreter: see `free_share`
GPU_SHARE = 1 / 32  # of a GPU's free memory, as scratch
# Bound on partial sums. Not a share of free memory: how a sum is cut decides how it is rounded.
PARTS_BYTES = 256 << 20

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)

# TRITON_INTERPRET counts when triton is imported; triton's own functions tell how it was set then.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is compiled and launched. Configurations are few and fixed: the interpreter cannot autotune."""

    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None  # per thread; NVIDIA only

    @property
    def options(self) -> dict[str, int]:
        limit = {} if self.max_registers is None or torch.version.hip else {"maxnreg": self.max_registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def free_share(device: torch.device) -> int:
    """A good `scratch_bytes`: a share of what is free on a GPU, the free blocks of torch's allocator included."""
    if device.type != "cuda":
        return SCRATCH_BYTES
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(SCRATCH_BYTES, int(GPU_SHARE * (torch.cuda.mem_get_info(device)[0] + unused)))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pow2(n: int, at_least: int = 1, at_most: int = 1 << 20) -> int:
    """The smallest power of two >= n, clamped to bounds that are powers of two themselves."""
    return min(max(1 << max(n - 1, 0).bit_length(), at_least), at_most)


def spans(total: int, size: int) -> Iterator[slice]:
    """0..total in slices of `size`, the last one shorter."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def launcher(run: Callable[P, R]) -> Callable[P, R]:
    """Checks the device and dtype of every tensor argument of `run`, then calls it with their device current.

    Raises RuntimeError (Triton cannot run on the device), TypeError (no kernel for the dtype, such as float64),
    ValueError (tensors on different devices).
    """
    signature = inspect.signature(run)

    @functools.wraps(run)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = signature.bind(*args, **kwargs).arguments
        tensors = {name: value for name, value in bound.items() if isinstance(value, Tensor)}
        device = _check(tensors)
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return run(*args, **kwargs)

    return checked


def _check(tensors: dict[str, Tensor]) -> torch.device:
    (first, tensor), *others = tensors.items()
    device = tensor.device
    if device.type != "cuda" and not (device.type == "cpu" and INTERPRETED):
        raise RuntimeError(
            f"{first}: expected a CUDA or ROCm tensor, got one on {device}. Triton's interpreter runs the kernels on"
            " the CPU, slowly: start Python with TRITON_INTERPRET=1 in the environment"
        )
    for name, other in others:
        if other.device != device:
            raise ValueError(f"{name}: expected on {device}, where {first} is, got {other.device}; move one of them")
    for name, other in tensors.items():
        if other.dtype not in FLOATS + INTEGERS:
            raise TypeError(
                f"{name}: expected float32, float16 or bfloat16 (ids: int32 or int64), got {other.dtype}; the Triton"
                " kernels accumulate in float32: cast it, or use the torch backend"
            )
    return device


def check_range(name: str, indices: Tensor, rows: int) -> None:
    """Raises ValueError unless all ids lie in -1..rows-1. CPU tensors only: on a GPU it would wait for the device."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(indices))
    if low < -1 or high >= rows:
        raise ValueError(f"{name}: expected ids in 0..{rows - 1}, or -1 for an empty slot, got {low}..{high}")
