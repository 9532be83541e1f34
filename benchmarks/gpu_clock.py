"""Timing on a GPU for `gpu.py`, and its lines of results.

Without a GPU (the interpreter, `--dry`) functions run once and have no time.
"""

import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SAMPLE_SECONDS = 0.15  # of repetitions per measurement
LEAST, MOST = 3, 30  # repetitions


def ms(function: Callable[[], Any]) -> float | None:
    """Median milliseconds of a call on the GPU, after a first one that compiles."""
    function()
    if not GPU:
        return None
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while len(pairs) < LEAST or (len(pairs) < MOST and time.perf_counter() - begin < SAMPLE_SECONDS):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        last.synchronize()
        pairs.append((first, last))
    return statistics.median(first.elapsed_time(last) for first, last in pairs)


def host_ms(function: Callable[[], Any]) -> float | None:
    """Milliseconds that the host needs to launch a call, without waiting for the GPU."""
    if not GPU:
        return None
    function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    torch.cuda.synchronize()
    return 1e3 * seconds


def peak_mib(function: Callable[[], Any]) -> float | None:
    """MiB that a call allocates beyond what is alive before it, results included."""
    if not GPU:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def syncs(function: Callable[[], Any]) -> int | None:
    """How often a call makes the host wait for the GPU."""
    if not GPU:
        return None
    function()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def rate(work: float, milliseconds: float | None) -> float | None:
    """`work` per second, in units of 1e12."""
    return None if milliseconds is None else work / milliseconds / 1e9


@dataclass
class Results:
    """Every result as one printed line, at once, and as one line of JSON in `file`."""

    section: str
    file: Path

    def add(self, name: str, **numbers: Any) -> None:
        shown = "  ".join(f"{key} {_short(value)}" for key, value in numbers.items() if value is not None)
        print(f"{self.section:10} {name:44} {shown}", flush=True)
        with self.file.open("a") as lines:
            lines.write(json.dumps({"section": self.section, "name": name, **numbers}) + "\n")

    @contextmanager
    def guarded(self, name: str) -> Iterator[None]:
        """A failure inside is a result as well, and what follows is measured."""
        try:
            yield
        except Exception as error:
            self.add(name, failed=f"{type(error).__name__}: {error}".splitlines()[0][:300])
            if GPU:
                torch.cuda.empty_cache()

    def time(self, name: str, function: Callable[[], Any], flops: float = 0, bytes_: float = 0, **more: Any) -> None:
        """Milliseconds of a call, and its TFLOP/s or TB/s where its work is given."""
        with self.guarded(name):
            taken = ms(function)
            rates = {"TFLOP/s": rate(flops, taken) if flops else None, "TB/s": rate(bytes_, taken) if bytes_ else None}
            self.add(name, ms=taken, **rates, **more)


def _short(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
