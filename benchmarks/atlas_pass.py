"""The atlas's pass over text beside an evaluation of the same tokens: seconds of processor time, alternating.

python benchmarks/atlas_pass.py RUN
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparseclt.atlas.build import write_atlas
from sparseclt.evaluation.metrics import evaluate
from sparseclt.observations.gather import gather
from sparseclt.runs import load_run
from sparseclt.runs.measurement import held_out_rows
from sparseclt.storage.run_config import read_config


def seconds(work: Callable[[], object]) -> float:
    """Processor time, of all threads: the clock depends on what else runs."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


def ratio(times: list[float], base: list[float]) -> float:
    """The median of the quotients of runs that followed one another."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--times", type=int, default=5, help="of each, after one that is not counted")
    arguments = parser.parse_args()
    config = read_config(arguments.run)
    config = replace(config, data=replace(config.data, held_out_tokens=arguments.tokens))
    clt, model = load_run(arguments.run)
    rows = held_out_rows(config, model)
    with tempfile.TemporaryDirectory() as folder:
        about: dict[str, Any] = {"name": "", "config": {}, "evaluation": None, "metrics": {}, "split": "held_out"}
        works: dict[str, Callable[[], object]] = {
            "an evaluation": lambda: evaluate(clt, model, rows),
            "the same without cross-entropy": lambda: evaluate(clt, model, rows, cross_entropy=False),
            "the atlas's pass": lambda: gather(clt, model, rows, Path(folder)),
            "all of the atlas, with its pages": lambda: write_atlas(clt, model, rows, Path(folder, "atlas"), about),
        }
        taken: dict[str, list[float]] = {name: [] for name in works}
        for time_ in range(arguments.times + 1):
            for name, work in works.items():
                spent = seconds(work)
                if time_:
                    taken[name].append(spent)
    bases = ("an evaluation", "the same without cross-entropy")
    print(
        f"| {rows.numel():,} tokens, median of {arguments.times} | s of processor time | x {bases[0]} | x {bases[1]} |"
    )
    print("| --- | ---: | ---: | ---: |")
    for name, times in taken.items():
        ratios = " | ".join(f"{ratio(times, taken[base]):.2f}" for base in bases)
        print(f"| {name} | {statistics.median(times):.2f} | {ratios} |")


if __name__ == "__main__":
    main()
