"""Whether a run on several processes reaches the FVU of the same run on one.

    python benchmarks/ranks_agree.py [--ranks 2] [--data 1] [--tolerance 0.01] [--one RUN] [OPTION ...]

Trains with the default settings, those of `make demo`, and any further options of `sparseclt train` (`--steps 60` for a
short look), on one process and on several. `--data`: how many groups of these share the rows of a batch; 1: all of
them share the CLT. `--one`: a finished run on one process with the same options, which is then not trained again.
Prints the means of both tables; the exit status is 1 if an FVU differs by more than the tolerance.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

FIGURES = ("fvu_vanilla", "fvu_sparse", "excess_fvu")


def train(out: Path, ranks: int, options: list[str]) -> None:
    """A run in directory `out`, on `ranks` processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "sparseclt", "train", "--out", str(out), "--logging.no-progress"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run([*command, *options], env=environment, check=True, stdout=subprocess.DEVNULL)


def mean(run: Path) -> dict[str, float]:
    """The means over modules of a finished run."""
    found: dict[str, float] = json.loads((run / "evaluation.json").read_text())["mean"]
    return {name: found[name] for name in FIGURES if found.get(name) is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.01)
    parser.add_argument("--one", type=Path)
    arguments, options = parser.parse_known_args()
    n = arguments.ranks
    grid = ["--parallel.latents", str(n // arguments.data), "--parallel.data", str(arguments.data)]
    with tempfile.TemporaryDirectory() as folder:
        one = arguments.one or Path(folder, "one")
        if arguments.one is None:
            train(one, 1, options)
        train(Path(folder, "several"), n, [*options, *grid])
        ours, theirs = mean(Path(folder, "several")), mean(one)
    print(f"| mean over modules | 1 process | {n} processes | difference |\n| --- | ---: | ---: | ---: |")
    for name, value in theirs.items():
        print(f"| {name} | {value:.5f} | {ours[name]:.5f} | {ours[name] / value - 1:+.3%} |")
    worst = max(abs(ours[name] / theirs[name] - 1) for name in theirs if name.startswith("fvu_"))
    return int(worst > arguments.tolerance)


if __name__ == "__main__":
    sys.exit(main())
