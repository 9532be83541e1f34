"""The command on two processes, as torchrun starts them."""

import json
import os
import subprocess
import sys

from tiny_models import save_model_and_text

from sparseclt.cli import main
from sparseclt.model.clt import SparseCLT
from sparseclt.training.loggers import read_metrics


def torchrun(folder, *program: str) -> subprocess.CompletedProcess:
    """Two processes of `program`, a file or a module with its arguments, in `folder`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)


def test_training_on_two_processes_prints_once_and_leaves_a_finished_run(tmp_path, monkeypatch):
    save_model_and_text(tmp_path)
    done = torchrun(
        tmp_path, "-m", "sparseclt",
        "train", "--out", "run", "--model.path", "model", "--data.source", "text.txt", "--steps", "6",
        "--data.row-tokens", "12", "--data.cache", "cache", "--data.held-out-share", "0.2", "--clt.latents", "32",
        "--clt.active", "4", "--connections.per-latent", "4", "--logging.every-steps", "1", "--logging.no-progress",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes: 2 x 1 ranks (--parallel.data 2, --parallel.latents 1)") == 1
    assert done.stdout.count("| mlp_0 ") == 3 and done.stdout.count("Run directory: run") == 1  # three tables
    run = tmp_path / "run"
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == list(range(1, 7))
    assert {"table.md", "loss.png", "fvu_against_c.png", "identity.json"} <= {path.name for path in run.iterdir()}
    assert json.loads((run / "config.json").read_text())["parallel"]["latents"] is None  # others may go on with it
    assert SparseCLT.from_pretrained(run / "clt").connected
    monkeypatch.chdir(tmp_path)  # the model's path is relative
    assert main(["export", "run", "exported", "--format", "circuit-tracer"]) == 0
    assert (tmp_path / "exported" / "config.yaml").is_file()
