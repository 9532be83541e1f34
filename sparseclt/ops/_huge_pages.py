"""Large results on huge pages.

A fresh 32 MiB tensor costs 8192 page faults on Linux before anything is computed in it, which can take longer than
the gradient that it is for; on pages of 2 MiB it costs 16.
"""

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

LEAST_BYTES = 4 << 20
_HUGE = 14  # MADV_HUGEPAGE


@cache
def _advise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    advise = getattr(ctypes.CDLL(None), "madvise", None)
    if advise is not None:
        advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return advise


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """`like.new_empty(shape)` for a CPU tensor all of which will be written."""
    tensor = like.new_empty(shape)
    size, advise = tensor.numel() * tensor.element_size(), _advise()
    if size >= LEAST_BYTES and advise is not None:
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(first, length, _HUGE)  # a wish: where it is refused, pages stay small
    return tensor
