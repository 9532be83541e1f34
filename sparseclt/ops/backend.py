"""Which implementation of an op runs.

A backend gives each op a plain forward and a plain backward function; `registration` makes them one operator
with fake tensors and autograd. `reference` stays outside it: ordinary differentiable torch, one function an op.
The choice is made at each call, by name or from the tensor.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Optional:
    """A backend that is imported when first asked for: `module` registers it and needs `package`."""

    module: str
    package: str
    install: str
    dtypes: tuple[torch.dtype, ...]
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Implementation:
    """What a backend runs for an op, with checked arguments. `csc`: its forward pass reads the order of the
    connections by upstream latent, so that it is worth sorting without a gradient, too."""

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    csc: bool = False

    @property
    def gradients(self) -> Callable[..., Any]:
        assert self.backward is not None, "an op without a gradient"
        return self.backward


OPTIONAL = {
    "triton": Optional(
        "sparseclt.ops._triton",
        "triton",
        "pip install 'sparseclt[triton]'",
        (torch.float32, torch.float16, torch.bfloat16),
        ("cuda",),  # ROCm calls itself cuda
    ),
    "numba": Optional(
        "sparseclt.ops._numba",
        "numba",
        "pip install 'sparseclt[cpu]'",
        (torch.float32, torch.float64),
        ("cpu",),
    ),
}
# Triton reads this when it is imported: as late as here it must have been decided.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = {name for name, optional in OPTIONAL.items() if find_spec(optional.package) is not None}

_implementations: dict[tuple[str, str], Implementation] = {}


def register(
    op: str,
    backend: str,
    forward: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    *,
    csc: bool = False,
) -> None:
    """Let `backend` run `op`."""
    _implementations[op, backend] = Implementation(forward, backward, csc)


def backends() -> tuple[str, ...]:
    """Names accepted by every op's `backend` argument, whether or not they can run here."""
    return tuple(dict.fromkeys((*(name for _, name in _implementations if name not in OPTIONAL), *OPTIONAL)))


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
    if (op, backend) not in _implementations:
        known = ", ".join(repr(name) for name in backends())
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


def implementation(op: str, backend: str) -> Implementation:
    """What `backend`, as `choose` gave it, runs for `op`. Imports an optional backend when first used."""
    if (op, backend) not in _implementations:
        importlib.import_module(OPTIONAL[backend].module)
    return _implementations[op, backend]
