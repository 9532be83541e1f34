"""How contenders are timed, weighed and checked. A contender is a function without arguments.

Time: contenders take turns, in a new random order each round, so that other load on the machine affects all of them
alike; they are compared by the median over rounds of the ratio of their times in the same round.
Memory: the transient bytes of one call, which are its peak less the bytes that remain after it (its results).
"""

import ctypes
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Function = Callable[[], Any]


@dataclass(frozen=True)
class Effort:
    """Rounds of a comparison: as many as fit in `seconds`, within bounds."""

    seconds: float
    least: int
    most: int
    sample_seconds: float = 0.01  # a faster function is called several times for one sample


@dataclass(frozen=True)
class Samples:
    """Seconds of one call, one number per round, each the mean of `calls` calls."""

    seconds: list[float]
    calls: int


def quartiles(values: list[float]) -> dict[str, float]:
    """The median, and the first and third quartiles as its spread."""
    low, median, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def interleave(
    functions: Mapping[str, Function], warm_seconds: Mapping[str, float], effort: Effort
) -> dict[str, Samples]:
    """Samples of every function. `warm_seconds`: rough seconds of one call, from an earlier one."""
    calls = {
        name: max(1, min(50, round(effort.sample_seconds / max(seconds, 1e-7))))
        for name, seconds in warm_seconds.items()
    }
    # As in a loop, a timed call follows another one, unless calls are so long that it does not matter.
    first = {name: 1 if warm_seconds[name] < 3 else 0 for name in functions}
    round_seconds = sum((first[name] + calls[name]) * warm_seconds[name] for name in functions)
    rounds = max(effort.least, min(effort.most, int(effort.seconds / max(round_seconds, 1e-7))))
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, shuffle = list(functions), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            for _ in range(first[name]):
                functions[name]()
            seconds[name].append(sample(functions[name], calls[name]))
    return {name: Samples(values, calls[name]) for name, values in seconds.items()}


def sample(function: Function, calls: int) -> float:
    """Seconds of one call: on CUDA with a cold L2, by triton's own timer; on the CPU the mean of `calls` calls."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(function, warmup=5, rep=30, return_mode="median") / 1e3
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    finally:
        if collecting:
            gc.enable()


@dataclass(frozen=True)
class Weighed:
    """One call: its results, seconds, and transient bytes, both as torch's allocator records them and as the growth of
    the resident set (None where the system does not report it), which includes allocations of other libraries."""

    results: Any
    seconds: float
    allocated: int
    resident: int | None


def weigh(function: Function, parameters: Iterable[Tensor] = ()) -> Weighed:
    """Call the function twice; the first call is also its warm-up.

    Gradients that it leaves in `parameters` count as results from their allocation on.
    """
    if torch.cuda.is_available():
        function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        results = function()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return Weighed(results, seconds, torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated(), None)
    parameters = list(parameters)
    hooks = [p.register_post_accumulate_grad_hook(_mark_gradient(i)) for i, p in enumerate(parameters)]
    with torch.profiler.profile(profile_memory=True) as profile:
        results = function()
    for hook in hooks:
        hook.remove()
    events = [e for e in profile.profiler.kineto_results.events() if e.name().startswith(("[memory]", _GRADIENT))]
    changes: list[int | None] = []  # of the bytes that are allocated, without gradients
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            changes.append(event.nbytes())
            continue
        parameter = parameters[int(event.name().removeprefix(_GRADIENT))]
        if parameter.grad is None:  # used up within the call
            continue
        size = parameter.grad.numel() * parameter.grad.element_size()
        allocation = next((i for i in reversed(range(len(changes))) if changes[i] == size), None)
        if allocation is None:
            changes.append(-size)
        else:
            changes[allocation] = None
    levels = list(accumulate(change for change in changes if change is not None))
    peak, left = max([0, *levels]), [0, *levels][-1]
    del results, profile, events
    resident = _reset_resident_peak()
    start = time.perf_counter()
    results = function()
    seconds = time.perf_counter() - start
    if resident:
        high = _status_bytes("VmHWM")
        _return_free_memory()
        resident_bytes = max(0, high - _status_bytes("VmRSS"))
    return Weighed(results, seconds, peak - left, resident_bytes if resident else None)


_GRADIENT = "[gradient] "


def _mark_gradient(index: int) -> Callable[[Tensor], None]:
    def mark(_: Tensor) -> None:
        with torch.profiler.record_function(f"{_GRADIENT}{index}"):
            pass

    return mark


def _return_free_memory() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset_resident_peak() -> bool:
    """Reset VmHWM to the present resident set; False where that is not possible."""
    if sys.platform != "linux":
        return False
    _return_free_memory()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        return True
    except OSError:
        return False


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


@dataclass(frozen=True)
class Ceiling:
    """The best rates of the machine, measured beside the contenders: flop/s of a GEMM, bytes/s of a copy."""

    flops: float
    bytes: float

    def seconds(self, flops: float, bytes_: float) -> float:
        """The least time of a piece of work: its roofline."""
        return max(flops / self.flops, bytes_ / self.bytes)


def measure_ceiling(dtype: torch.dtype, device: str, small: bool) -> Ceiling:
    """Bytes read and bytes written both count; the tensors of the copy are far larger than any cache."""
    n, size = (8192, 1 << 30) if device == "cuda" else (256, 1 << 22) if small else (1536, 1 << 27)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    functions = {"gemm": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    best = {name: min(sample(function, 1) for _ in range(4)) for name, function in functions.items()}
    return Ceiling(2 * n**3 / best["gemm"], 2 * size / best["copy"])


def errors(results: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of every named result: the norm of the difference over the norm; inf for another shape or for a
    result that is not finite."""
    found = {}
    for name, expected in truth.items():
        got = results[name]
        if got.shape != expected.shape or not got.isfinite().all():
            found[name] = float("inf")
            continue
        size = expected.double().norm().item()
        found[name] = (got.double() - expected.double()).norm().item() / (size or 1.0)
    return found
