"""How the numba backend compiles functions and runs them on several threads.

Kernels are compiled for the types they first meet, without the interpreter lock, and cached on disk: beside the
source, or in the user's cache directory where that cannot be written. A kernel takes the rows that it owns,
`start` and `stop`, first: threads are ours (numba's own would compile ten times longer and cannot be called from
two threads), and as each row is written by one thread, in a fixed order, results do not depend on their number.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch
from torch import Tensor

# Sums may be added up in vector lanes; NaN and infinity keep their meaning.
SUMS = {"contract", "reassoc", "nsz"}

WORK_A_THREAD = 100_000  # numbers to touch that are worth another thread

_pools: dict[int, ThreadPoolExecutor] = {}  # by number of threads; a forked child has to make its own
os.register_at_fork(after_in_child=_pools.clear)


def kernel(fastmath: set[str] | bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compile a function with numba. Kernels may call those of their own file only: a cached one does not notice
    when another file changes."""

    # Division as in torch: with Python's, which raises an error for 0, loops would not run in vector lanes.
    options: dict[str, Any] = {"nogil": True, "fastmath": fastmath, "error_model": "numpy"}

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # there is no directory to cache in
            return numba.njit(**options)(function)

    return compiled


def run(kernel: Callable[..., Any], rows: int, work: int, *args: Any) -> None:
    """`kernel(start, stop, *args)` for all rows, on as many threads as torch uses. `work`: about how many numbers
    all rows touch."""
    given = [arg.detach().numpy() if isinstance(arg, Tensor) else arg for arg in args]
    threads = min(torch.get_num_threads(), rows, 1 + work // WORK_A_THREAD)
    if threads <= 1:
        kernel(0, rows, *given)
        return
    borders = [rows * part // threads for part in range(threads + 1)]
    pool = _pools.get(threads - 1)
    if pool is None:
        pool = _pools.setdefault(threads - 1, ThreadPoolExecutor(threads - 1, "sparseclt"))
    others = [pool.submit(kernel, borders[t], borders[t + 1], *given) for t in range(1, threads)]
    kernel(borders[0], borders[1], *given)
    for other in others:
        other.result()
