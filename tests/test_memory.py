"""What a training step allocates: nothing of size N x F beyond a bounded chunk, F x F or F x U."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from clts import language_model
from tiny_models import tokens
from torch.utils._python_dispatch import TorchDispatchMode

from sparseclt.config import CLTConfig, ConnectionConfig, DataConfig, LossConfig, TrainConfig
from sparseclt.trainer import Trainer

F, ROW = 6000, 24


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation put out, in elements, and its shape."""

    elements, shape, op = 0, (), ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes() > self.elements * 4:
                self.elements = tensor.untyped_storage().nbytes() // 4
                self.shape, self.op = tuple(tensor.shape), str(func)
        return out


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


def trainer(tmp_path, backend=None, rows: int = 40, attention: str = "frozen") -> Trainer:
    config = TrainConfig(
        out=str(tmp_path), batch_rows=rows, backend=backend, progress=False,
        clt=CLTConfig(latents=F, active=8, attention=attention), data=DataConfig(row_length=ROW),
        connections=ConnectionConfig(per_latent=4, refresh_every=1), loss=LossConfig(dead_after=1, aux_active=4),
    )  # fmt: skip
    return Trainer(config, language_model=language_model("gpt2", torch.float32), rows=tokens(rows, ROW))


def run_steps(t: Trainer, steps: int) -> None:
    for _ in range(steps):
        t.train_step(t.capture(next(t.stream)))


def parameter_bytes(t: Trainer) -> int:
    return sum(p.numel() * p.element_size() for p in t.clt.parameters())


def test_a_step_with_connections_chosen_anew_holds_no_large_tensor(tmp_path):
    t = trainer(tmp_path)
    run_steps(t, 2)
    N, decoder = 40 * ROW, max(p.numel() for p in t.clt.parameters())
    chunk = (8 << 20) // 4
    allowed = max(decoder, 2 * F * 32, chunk)
    assert min(N * F, F * F, 2 * F * F) > 2 * allowed, "the test must be able to tell"
    with _Largest() as largest:
        run_steps(t, 1)
    assert largest.elements <= allowed, f"{largest.op} put out {largest.shape}"


def test_the_reference_backend_would_not_pass(tmp_path):
    t = trainer(tmp_path, backend="reference", rows=20)
    run_steps(t, 2)
    with _Largest() as largest:
        run_steps(t, 1)
    assert largest.elements >= F * F


def test_peak_memory_of_a_step_stays_below_one_dense_matrix(tmp_path):
    """Transient bytes of a step beyond the gradients: less than a single [F, F] or two [N, F] matrices."""
    t = trainer(tmp_path)
    run_steps(t, 2)
    t.optimizer.zero_grad(set_to_none=True)
    with peak_allocation() as peak:
        run_steps(t, 1)
    gradients = 2 * parameter_bytes(
        t
    )  # of the decoders there are two for a moment: from decoding and from virtual weights
    transient = peak[0] - gradients
    assert transient < F * F * 4, f"{transient / 2**20:.0f} MiB"
    assert math.isfinite(transient) and peak[0] > gradients / 2, "the record is there"


@pytest.mark.parametrize("attention", ["frozen"])
def test_transient_memory_grows_no_faster_than_the_tokens(tmp_path, attention):
    """Twice the tokens: at most twice the transient bytes."""
    peaks = []
    for rows in (20, 40):
        t = trainer(tmp_path, rows=rows, attention=attention)
        run_steps(t, 2)
        t.optimizer.zero_grad(set_to_none=True)
        with peak_allocation() as peak:
            run_steps(t, 1)
        peaks.append(peak[0] - 2 * parameter_bytes(t))
    assert peaks[1] < 2.2 * max(peaks[0], 8 << 20)
