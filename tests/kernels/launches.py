"""Counts what launchers would launch on a GPU, at any shape and within seconds: nothing runs.

Tensors are on the meta device, where they have no data. Kernels are noted instead of launched; a torch op that computes
something counts as one launch (it may be several).
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from csrc_triton import launch

# Views and allocations: nothing for the GPU to do.
FREE = set(
    "empty new_empty empty_like empty_strided new_empty_strided view _unsafe_view reshape _reshape_alias as_strided"
    " slice select narrow expand unsqueeze squeeze t transpose permute detach alias unbind split split_with_sizes"
    " unflatten lift_fresh".split()
)


class _TorchOps(TorchDispatchMode):
    def __init__(self, launches: Counter[str]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if name not in FREE and func.namespace == "aten":
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Launches by name of a kernel or torch op, until the block ends."""
    launches: Counter[str] = Counter()

    def note(kernel, grid):  # type: ignore[no-untyped-def]
        return lambda *args, **kwargs: launches.update([kernel.fn.__name__])

    patched = [(KernelInterface, "__getitem__", note), (launch, "_check", lambda tensors: _device(tensors))]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    for owner, name, function in patched:
        setattr(owner, name, function)
    try:
        with _TorchOps(launches):
            yield launches
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _device(tensors: dict[str, Tensor]) -> torch.device:
    return next(iter(tensors.values())).device
