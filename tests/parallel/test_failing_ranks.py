"""A rank that fails ends the run on all of them, which says which one it was; the run goes on from its checkpoint."""

import re
import time

import pytest
from test_torchrun import torchrun
from tiny_models import save_model_and_text

from sparseclt.cli import main
from sparseclt.training.loggers import read_metrics

PROGRAM = """
import os, signal, sys, time
import torch
from sparseclt.cli import main
from sparseclt.training.objective import Objective

backward = Objective._backward

def failing(self, *arguments):
    failing.steps += 1
    if failing.steps == 4 and os.environ["RANK"] == "1":
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[1] == "slow":
            time.sleep(1000)
        raise torch.OutOfMemoryError("no room")
    return backward(self, *arguments)

failing.steps = 0
Objective._backward = failing
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failing")
    save_model_and_text(folder)
    (folder / "program.py").write_text(PROGRAM)
    return folder


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("killed", r"Signal 9 \(SIGKILL\) received by PID"),
        ("memory", r"step 3: out of memory|step 3: .*memory"),
        ("slow", r"(?i)timed? ?out"),
    ],
)
def test_it_ends_the_run_on_all_and_is_named(folder, monkeypatch, how, said):
    start = time.monotonic()
    done = torchrun(
        folder, "program.py", how, "train", "--out", how, "--model.path", "model", "--data.source", "text.txt",
        "--steps", "6", "--data.row-tokens", "12", "--data.cache", "cache", "--data.held-out-share", "0.2",
        "--clt.latents", "32", "--clt.active", "4", "--connections.per-latent", "4", "--checkpoints.every-steps", "2",
        "--parallel.latents", "2", "--parallel.timeout-seconds", "8", "--logging.no-progress",
    )  # fmt: skip
    assert done.returncode != 0 and time.monotonic() - start < 200
    assert re.search(said, done.stderr), done.stderr[-3000:]
    failed = re.search(r"Root Cause.*?rank +: (\d)", done.stderr, flags=re.DOTALL)
    assert failed and int(failed[1]) == (0 if how == "slow" else 1), (
        "of a slow one, the first to fail has waited for it"
    )
    monkeypatch.chdir(folder)
    assert main(["resume", how, "--logging.no-progress"]) == 0
    assert [row["step"] for row in read_metrics(folder / how / "metrics.jsonl")][-1] == 6
