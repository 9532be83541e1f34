"""The sections of `gpu.py` on whole training steps, the optimiser's part of one, peers, and the tests."""

import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bare_image
import torch
from gpu_clock import DEVICE, GPU, Results, host_ms, peak_mib, syncs
from gpu_kernels import Sizes, encoder, spread_ids

ROOT = Path(__file__).resolve().parents[1]
SHAPE_B = {"L": 12, "D": 768, "F": 24_576, "K": 32, "C": 32, "N": 4096}  # of GPT-2 small
# The dense masked step keeps matrices F x U for every pair of layers: at L 12 more than the GPU has.
FEW_LAYERS = SHAPE_B | {"L": 4}
TINY = {"L": 2, "D": 16, "F": 64, "K": 4, "C": 4, "N": 12}


def _trainer(mode: str, sizes: dict[str, int]) -> tuple[Any, Any]:
    """A trainer and activations, on the triton backend, which the interpreter has to be asked for."""
    from steps import make_activations, make_trainer

    torch.manual_seed(0)
    trainer = make_trainer(mode, DEVICE, **sizes)
    trainer.config = replace(trainer.config, compute=replace(trainer.config.compute, backend="triton"))
    trainer.objective.config = trainer.config
    return trainer, make_activations(device=DEVICE, **sizes)


def optimiser(out: Results, x: Sizes) -> None:
    """The optimiser's step alone at shape B: how long the host is busy, how long the GPU, and how often one waits."""
    sizes = SHAPE_B if GPU else TINY
    for mode in ("vanilla", "both") if GPU else ("both",):
        with out.guarded(f"optimiser, {mode}"):
            trainer, activations = _trainer(mode, sizes)
            from sparseclt.training.update import clip_and_step

            backward = trainer.objective.backward(activations, 1.0, lambda total, terms: None)
            encoders = {name: p.grad for name, p in trainer.clt.named_parameters() if p.grad is not None}

            def step(trainer: Any = trainer, backward: Any = backward, encoders: Any = encoders) -> None:
                for name, parameter in trainer.clt.named_parameters():
                    parameter.grad = encoders[name].clone() if name in encoders else None
                clip_and_step(trainer.clt, backward.gradients, trainer.optimizer, 0.0, 1.0)

            out.add(f"optimiser, {mode}: waits for the GPU", waits=syncs(step))
            out.add(f"optimiser, {mode}: time of the host", host_ms=host_ms(step))
            out.time(f"optimiser, {mode}", step, MiB=peak_mib(step))


def step(out: Results, x: Sizes) -> None:
    """Whole training steps at shape B, and beside the dense masked step with fewer layers."""
    from baselines import loss
    from steps import dense_masks, make_adam

    for mode in ("vanilla", "both") if GPU else ("both",):
        for label, sizes in (("B", SHAPE_B), ("B, L 4", FEW_LAYERS)) if GPU else (("tiny", TINY),):
            with out.guarded(f"{mode}, {label}"):
                trainer, activations = _trainer(mode, sizes)
                run = partial(trainer.train_step, activations)
                for precision in ("bf16", "fp32"):
                    _take(trainer, precision)
                    more: dict[str, Any] = {"tokens": sizes["N"], "planned_GiB": _planned(trainer) if GPU else None}
                    more |= {"MiB": peak_mib(run), "waits": syncs(run)}
                    used = torch.cuda.max_memory_allocated() / 2**30 if GPU else None
                    out.time(f"{mode}, {label}: train_step, {precision}", run, GiB=used, **more)
                if label == "B" and mode == "both":
                    continue  # see FEW_LAYERS
                i = SimpleNamespace(
                    clt=list(trainer.clt), activations=activations, k=sizes["K"], layers=sizes["L"],
                    agreement_weight=trainer.config.loss.latent_agreement_weight,
                )  # fmt: skip
                if mode == "both":
                    i.masks = dense_masks(trainer)
                trainer.optimizer.state.clear()
                adam = make_adam(list(trainer.clt.parameters()))

                def dense(i: Any = i, adam: Any = adam, mode: Any = mode) -> None:
                    adam.zero_grad(set_to_none=True)
                    loss(i, mode).backward()
                    adam.step()

                for precision in ("bf16", "fp32"):
                    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
                        out.time(f"{mode}, {label}: dense, {precision}", dense, MiB=peak_mib(dense), tokens=sizes["N"])


def _take(trainer: Any, precision: Any) -> None:
    """Let the trainer's products have another precision from now on."""
    from sparseclt.training.precision import products

    trainer.config = replace(trainer.config, compute=replace(trainer.config.compute, precision=precision))
    trainer.objective.config, trainer.clt.products = trainer.config, products(trainer.config)


def _planned(trainer: Any) -> float:
    """GiB that the memory plan gives this run."""
    from sparseclt.training.memory import make_plan

    total = torch.cuda.get_device_properties(0).total_memory
    return make_plan(trainer.config, trainer.shape, total).peak / 2**30


def peers(out: Results, x: Sizes) -> None:
    """Kernels of other projects, where they are installed."""
    import peers as installed

    a, W, b = encoder(x, x.dtype)
    i = SimpleNamespace(x=a, W_enc=W, b_enc=b, k=x.K, W_dec=W, indices=spread_ids(x.N, x.K, x.F))
    i.values = torch.rand(i.indices.shape, device=DEVICE).to(x.dtype)
    for op in ("topk_encode", "sparse_decode"):
        if not (found := installed.peers(op)):
            out.add(f"{op}: no peer is installed")
        for name, function in found.items():
            out.time(f"{op}: {name}", partial(function, i))


def tests(out: Results, x: Sizes) -> None:
    """The tests of kernels and ops, on this GPU."""
    if not GPU or find_spec("pytest") is None:
        out.add("needs a GPU and pytest", skipped=True)
        return
    skip = ("test_compile", "test_standalone", "test_traffic", "test_dropin", "test_numba")
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    command += [f"--ignore-glob=*{name}*" for name in skip] + ["tests/kernels", "tests/ops"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        last = ""
        for line in run.stdout:
            last = line.strip() or last
            if line.startswith(("FAILED", "ERROR")):
                out.add(line.split(" - ")[0].strip()[:120], failed="test")
    out.add("tests", result=last, failed=None if run.returncode == 0 else f"exit status {run.returncode}")


ABSENT = bare_image.absent  # packages that were stood in for
SECTIONS = (optimiser, step, peers, tests)
