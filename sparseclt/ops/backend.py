"""Which backend runs an op.

A backend gives each op a forward and a backward function; `operator` makes them one operator with fake tensors and
autograd. `reference` stays outside it: ordinary differentiable torch, one function per op. The choice is made at each
call, by name or from the tensor.
"""

import os
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor


@dataclass(frozen=True)
class Optional:
    """A backend that is imported at first use: what it needs, and what it runs on."""

    package: str
    install: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...]


OPTIONAL = {
    "triton": Optional(
        "triton",
        "pip install 'sparseclt[triton]'",
        (torch.float32, torch.float16, torch.bfloat16),
        ("cuda",),  # ROCm calls itself cuda
    ),
    "numba": Optional(
        "numba",
        "pip install 'sparseclt[cpu]'",
        (torch.float32, torch.float64),
        ("cpu",),
    ),
}
BACKENDS = ("reference", "torch", *OPTIONAL)
# Triton reads this when it is imported: as late as here it must have been decided.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = {name for name, optional in OPTIONAL.items() if find_spec(optional.package) is not None}


def backends() -> tuple[str, ...]:
    """Names that every op's `backend` argument accepts, whether or not they can run here."""
    return BACKENDS


def choose(op: str, backend: str | None, tensor: Tensor) -> str:
    """The backend that runs `op` on `tensor`: the one named. For None, `triton` on a CUDA or ROCm tensor and `numba`
    on a CPU tensor, where they are installed and take its dtype; `torch` elsewhere (float64 on CUDA, fp16 and bf16 on
    the CPU).

    Backends agree to rounding, not to the last bit: for a run to continue bit by bit after an interruption, the same
    ones must be installed, or one named.

    Raises ValueError for a name that is unknown or cannot run there, ImportError where it is not installed,
    TypeError for a dtype that it does not take.
    """
    if backend is None:
        for name, optional in OPTIONAL.items():
            if tensor.device.type in optional.devices and _refusal(name, tensor) is None:
                return name
        return "torch"
    if backend in OPTIONAL:
        if (refusal := _refusal(backend, tensor)) is not None:
            raise refusal
        return backend
    if backend not in BACKENDS:
        known = ", ".join(repr(name) for name in BACKENDS)
        raise ValueError(f"backend of {op}: expected one of {known} or None (automatic), got {backend!r}")
    return backend


def _refusal(backend: str, tensor: Tensor) -> Exception | None:
    """Why an optional backend cannot run on `tensor`; None where it can."""
    optional = OPTIONAL[backend]
    if backend not in INSTALLED:
        return ImportError(f"backend={backend!r} needs {optional.package}: {optional.install}")
    device, interpreter = tensor.device.type, ""
    if device not in optional.devices and not (backend == "triton" and INTERPRETED and device == "cpu"):
        if backend == "triton":
            interpreter = (
                "; on the CPU it runs in Triton's interpreter only: set the environment variable TRITON_INTERPRET=1"
                " before Python starts"
            )
        return ValueError(
            f"backend={backend!r}: expected tensors on {' or '.join(optional.devices)}, got {device}{interpreter}, or"
            " take backend='torch'"
        )
    if tensor.dtype not in optional.dtypes:
        return TypeError(
            f"backend={backend!r}: expected one of {optional.dtypes}, got {tensor.dtype}; take backend='torch'"
        )
    return None
