"""Where the time of a training step of the full set goes: `python benchmarks/profile_step.py vanilla` (or `both`).

The functions that take most time themselves, of the Trainer's own step on the numba backend with one thread; times
include what the profiler adds.
"""

import cProfile
import pstats
import sys
import time

import torch
from shapes import STEPS
from steps import step_comparison


def main(mode: str, steps: int = 4, shown: int = 10) -> None:
    torch.set_num_threads(1)
    step = step_comparison(mode, STEPS["full"][mode], "cpu", strict=False, dense=False)
    step = step.contenders["ours: numba, train_step"].prepare()
    step()
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
