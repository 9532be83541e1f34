"""What a training step allocates: nothing of size N x F beyond a bounded chunk, F x F or F x U."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from clts import language_model
from op_helpers import LargestAllocation
from tiny_models import tokens

from sparseclt.config import (
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    TrainConfig,
)
from sparseclt.ops.scratch import SCRATCH_BYTES
from sparseclt.training.trainer import Trainer

F, ROW, REFRESH = 4000, 24, 5


@contextmanager
def peak_allocation() -> Iterator[list[int]]:
    """Peak bytes of tensor memory over what was allocated at the start, by torch's own allocation records."""
    result = [0]
    with torch.profiler.profile(profile_memory=True) as profile:
        yield result
    level, peak = 0, 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    result[0] = peak


def trainer(tmp_path, backend=None, rows: int = 40) -> Trainer:
    config = TrainConfig(
        out=str(tmp_path), batch_rows=rows, compute=ComputeConfig(backend=backend),
        logging=LoggingConfig(progress=False),
        clt=CLTConfig(latents=F, active=8), data=DataConfig(row_tokens=ROW),
        connections=ConnectionConfig(per_latent=4, refresh_steps=REFRESH),
        loss=LossConfig(sparse_start_share=0.0),
    )  # fmt: skip
    return Trainer(config, language_model=language_model("gpt2", torch.float32), rows=tokens(rows, ROW))


def run_steps(t: Trainer, steps: int) -> None:
    for _ in range(steps):
        t.train_step(t.batches.capture(next(t.batches.stream_at(t.step))))


def largest_of_a_step(t: Trainer, step: int) -> LargestAllocation:
    run_steps(t, step)
    with LargestAllocation() as largest:
        run_steps(t, 1)
    return largest


def test_a_step_holds_no_large_tensor(tmp_path):
    t = trainer(tmp_path)
    allowed = max(max(p.numel() for p in t.clt.parameters()), SCRATCH_BYTES["torch"] // 4)
    assert min(40 * ROW * F, F * F) > 3 * allowed, "the test must be able to tell"
    largest = largest_of_a_step(t, 3)
    assert largest.elements <= allowed, f"{largest.by} put out {largest.elements} elements"


def test_choosing_connections_anew_holds_no_f_by_u(tmp_path):
    t = trainer(tmp_path)
    allowed = (32 << 20) // 4
    assert 2 * F * F > 3 * allowed, "the test must be able to tell"
    largest = largest_of_a_step(t, REFRESH)
    assert largest.elements <= allowed, f"{largest.by} put out {largest.elements} elements"


def test_the_reference_backend_would_not_pass(tmp_path):
    assert largest_of_a_step(trainer(tmp_path, backend="reference", rows=20), 2).elements >= F * F


def transient_bytes(t: Trainer) -> int:
    """Peak bytes of a step beyond gradients, of which the encoders' and, of decoders this small, all are kept."""
    run_steps(t, 2)
    with peak_allocation() as peak:
        run_steps(t, 1)
    gradients = sum(p.numel() * p.element_size() for p in t.clt.parameters())
    assert peak[0] > gradients / 2, "the record is there"
    return peak[0] - gradients


def test_peak_memory_of_a_step_stays_below_one_dense_matrix(tmp_path):
    transient = transient_bytes(trainer(tmp_path))
    assert transient < F * F * 4, f"{transient / 2**20:.0f} MiB"


def test_transient_memory_grows_no_faster_than_the_tokens(tmp_path):
    few, many = (transient_bytes(trainer(tmp_path, rows=rows)) for rows in (20, 40))
    assert many < 2.2 * max(few, 8 << 20)
