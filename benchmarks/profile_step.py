"""Where the time of a training step of the full set goes: `python benchmarks/profile_step.py vanilla` (or `both`).

On the numba backend with one thread: the seconds of some steps (of these the operating system's), of plain autograd
and of the Trainer; then the functions of the Trainer's step that take most time themselves, under the profiler.
"""

import cProfile
import pstats
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from shapes import STEPS
from steps import step_comparison


def timed(step: Callable[[], Any]) -> str:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
    step()
    taken, system = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_stime - before
    return f"{taken:.2f} s ({system:.2f} s)"


def main(mode: str, steps: int = 4, shown: int = 10) -> None:
    torch.set_num_threads(1)
    contenders = step_comparison(mode, STEPS["full"][mode], "cpu", strict=False, dense=False).contenders
    for name in ("ours: numba", "ours: numba, train_step"):
        step = contenders[name].prepare()
        step()
        print(f"{name}: " + ", ".join(timed(step) for _ in range(steps)))
    profile, started = cProfile.Profile(), time.perf_counter()
    profile.enable()
    for _ in range(steps):
        step()
    profile.disable()
    a_step = (time.perf_counter() - started) / steps
    print(f"{a_step:.2f} s a step\n\n| ms a step | share | function |\n| ---: | ---: | --- |")
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, own, _, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:shown]:
        place = file.rpartition("/")[2].removesuffix(".py") if file.endswith(".py") else ""
        name = name.removeprefix("<built-in method ").removeprefix("<method ").removesuffix(">")
        print(f"| {own / steps * 1e3:.0f} | {own / steps / a_step:.0%} | `{f'{place}.' if place else ''}{name}` |")


if __name__ == "__main__":
    main(*sys.argv[1:])
