"""Where a training step makes the host wait for a GPU: counted in the interpreter, on the structure of a real run."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP = """
import sys, torch
from dataclasses import replace
from functools import partial
import steps
from steps import CLTConfig, OptimizerConfig, make_activations, make_trainer
from waits import Waits
import csrc_triton.launch, sparseclt.ops.checks, csrc_triton.transpose, csrc_triton.rows, csrc_triton.connected_encode
import csrc_triton.add_upstream, csrc_triton.virtual_matmul, sparseclt.ops.connected_encode, sparseclt.ops.sparse_decode
from sparseclt.training import optimizer, update

def nothing(*_): pass
for module in list(__import__("sys").modules.values()):  # ids are checked on the CPU only
    name = getattr(module, "__name__", "")
    for check in ("check_range", "check_ids"):
        if name.startswith(("csrc_triton", "sparseclt.ops")) and hasattr(module, check):
            setattr(module, check, nothing)
sizes = {"L": 2, "D": 16, "F": 24, "K": 2, "C": 2, "N": 6}
activations = make_activations(device="cpu", **sizes)
activations.counted = torch.ones_like(activations.tokens, dtype=torch.bool)
activations.counted[:, 0] = False
activations.counted_tokens = 5  # as a captured batch knows it
update.KEPT_BYTES = 0  # decoders as large as real ones are computed twice
optimizer.UNCOUNTED = ("cpu",)

def waits_of(activation, rows, precision):
    steps.CLTConfig = partial(CLTConfig, activation=activation)
    steps.OptimizerConfig = partial(OptimizerConfig, rows=rows)
    trainer = make_trainer("both", "cpu", **sizes)
    trainer.config = replace(trainer.config, compute=replace(trainer.config.compute, backend="triton"))
    trainer.objective.config = trainer.config
    trainer.clt.products = torch.bfloat16 if precision == "bf16" else None
    for module in trainer.clt:
        module.connections and module.connections.transposed
    with Waits() as waits:
        trainer.train_step(activations)
    return dict(waits.by_module)

print([waits_of(*way.split()) for way in sys.argv[1:]])
"""


WAYS = ["topk all fp32", "batchtopk touched bf16", "jumprelu all fp32"]  # activation, decoder rows updated, products


def test_ops_objective_and_optimiser_wait_only_to_read_the_norm_and_the_metrics():
    folders = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(folders)}
    ended = subprocess.run([sys.executable, "-c", STEP, *WAYS], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    for way, waits in zip(WAYS, eval(ended.stdout.splitlines()[-1]), strict=True):
        ours = {module: n for module, n in waits.items() if not module.startswith("sparseclt.connections")}
        assert ours == {"sparseclt.training.finite": 1, "sparseclt.training.trainer": 1}, (way, waits)
