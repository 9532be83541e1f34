"""A profile of one training step of the full set: `python benchmarks/profile_step.py vanilla` (or `both`).

On the numba backend with one thread: the seconds of a few steps (in brackets those of the operating system), with
plain autograd and with the Trainer; then, under the profiler, the functions that take most time of the Trainer's step.
"""

import argparse
import cProfile
import pstats
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from baseline_costs import Mode
from shapes import STEPS
from steps import step_comparison


def timed(step: Callable[[], Any]) -> str:
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_stime, time.perf_counter()
    step()
    taken, system = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_stime - before
    return f"{taken:.2f} s ({system:.2f} s)"


def main(mode: Mode, steps: int = 4, shown: int = 10) -> None:
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
    per_step = (time.perf_counter() - started) / steps
    print(f"{per_step:.2f} s per step\n\n| ms per step | share | function |\n| ---: | ---: | --- |")
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for (file, _, name), (_, _, own, _, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:shown]:
        place = file.rpartition("/")[2].removesuffix(".py") if file.endswith(".py") else ""
        name = name.removeprefix("<built-in method ").removeprefix("<method ").removesuffix(">")
        print(f"| {own / steps * 1e3:.0f} | {own / steps / per_step:.0%} | `{f'{place}.' if place else ''}{name}` |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=("vanilla", "both"))
    main(parser.parse_args().mode)
