"""What every launcher shares: launch configurations, checks of its tensors, small arithmetic."""

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)

# Kernels are interpreted if the variable was set when triton was imported: its own tl.sum tells.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)


@dataclass(frozen=True)
class LaunchConfig:
    """How a kernel is compiled and launched: few and fixed, since autotuning fails in the interpreter."""

    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


class AheadOfTime(NamedTuple):
    """A kernel with everything that fixes its machine code, to be compiled without a GPU.

    `signature` gives every argument a type: "*fp32", "i64", ..., with ":16" behind it where the launcher usually
    passes a multiple of 16 (pointers and strides: wide loads need it), "constexpr" for those in `constexprs`.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int]


def ahead_of_time_case(
    name: str, kernel: Any, types: list[str] | dict[str, str], constexprs: dict[str, Any], options: dict[str, int]
) -> AheadOfTime:
    """`types` are those of the arguments that are not in `constexprs`: all, in the kernel's own order, or by name,
    where strides of rows are else multiples of 16, and the rest i32."""
    left = [arg for arg in kernel.arg_names if arg not in constexprs]
    if isinstance(types, list):
        types = dict(zip(left, types, strict=True))
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {arg: types.get(arg, "i32:16" if arg.endswith("_row") else "i32") for arg in left}
    return AheadOfTime(name, kernel, signature, constexprs, options)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def pow2(n: int, at_least: int = 1, at_most: int = 1 << 20) -> int:
    """The least power of two >= n, kept within bounds that are powers of two themselves."""
    return min(max(1 << max(n - 1, 0).bit_length(), at_least), at_most)


def launcher(run: Callable[..., Any]) -> Callable[..., Any]:
    """Checks the device and dtype of every tensor argument of `run`, which then runs on their device.

    Raises RuntimeError (no device that Triton can run on), TypeError (float64 or another dtype without a kernel),
    ValueError (tensors on several devices).
    """
    signature = inspect.signature(run)

    @functools.wraps(run)
    def checked(*args: Any, **kwargs: Any) -> Any:
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
            raise ValueError(f"{name}: expected on {device}, where {first} is, got {other.device}; move one")
    for name, other in tensors.items():
        if other.dtype not in FLOATS + INTEGERS:
            raise TypeError(
                f"{name}: expected float32, float16 or bfloat16 (ids: int32 or int64), got {other.dtype}; the Triton"
                " kernels accumulate in float32: cast it, or use the torch backend"
            )
    return device


def check_range(name: str, indices: Tensor, rows: int) -> None:
    """Ids must lie in -1..rows-1. Read on the CPU only: on a GPU that would wait for the device."""
    if indices.device.type != "cpu" or indices.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(indices))
    if low < -1 or high >= rows:
        raise ValueError(f"{name}: expected ids in 0..{rows - 1}, or -1 for an empty slot, got {low}..{high}")
