"""Where a training step makes the host wait for a GPU: counted in the interpreter, on the structure of a real run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP = """
import torch
from dataclasses import replace
from steps import make_activations, make_trainer
from waits import Waits
import csrc_triton.launch, sparseclt.ops.checks, csrc_triton.transpose, csrc_triton.rows, csrc_triton.connected_encode
import csrc_triton.add_upstream, csrc_triton.virtual_matmul, sparseclt.ops.connected_encode, sparseclt.ops.sparse_decode
import sparseclt.training.optimizer as optimizer

def nothing(*_): pass
for module in list(__import__("sys").modules.values()):  # ids are checked on the CPU only
    name = getattr(module, "__name__", "")
    for check in ("check_range", "check_ids"):
        if name.startswith(("csrc_triton", "sparseclt.ops")) and hasattr(module, check):
            setattr(module, check, nothing)
sizes = {"L": 2, "D": 16, "F": 24, "K": 2, "C": 2, "N": 6}
trainer = make_trainer("both", "cpu", **sizes)
trainer.config = replace(trainer.config, compute=replace(trainer.config.compute, backend="triton"))
trainer.objective.config = trainer.config
optimizer.KEPT_BYTES = 0  # decoders as large as real ones are computed twice
for module in trainer.clt:
    module.connections and module.connections.transposed
activations = make_activations(device="cpu", **sizes)
with Waits() as waits:
    trainer.train_step(activations)
print(sorted(waits.by_module.items()))
"""


def test_ops_objective_and_optimiser_wait_only_to_read_the_norm_and_the_metrics():
    folders = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    ended = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    waits = dict(eval(ended.stdout.splitlines()[-1]))
    assert waits == {"sparseclt.training.finite": 1, "sparseclt.training.trainer": 1}, waits
