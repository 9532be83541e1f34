"""Gradients of micro-batches against those of the whole batch, and what happens when memory runs out."""

import json
import os
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import pytest
import torch
from clts import language_model
from test_decoder_gradients import trainer, warmed_up
from test_trainer import ROWS, whole_state
from test_trainer import trainer as small_trainer

from sparseclt.config import CheckpointConfig, CLTConfig, ComputeConfig, TrainConfig
from sparseclt.model.shape import ModelShape
from sparseclt.storage.checkpoint import latest, load_state
from sparseclt.training import memory
from sparseclt.training import optimizer as optim
from sparseclt.training.objective import Objective
from sparseclt.training.trainer import Trainer


def gradients_of(t: Trainer, activations, rows: int) -> dict[str, torch.Tensor]:
    """All gradients, and the loss terms, of a batch taken `rows` rows at a time."""
    t.clt.zero_grad()
    t.objective.micro_rows = rows
    noted, terms, *_ = t.objective.backward(activations, 0.7, lambda total, terms: None)
    noted.add_to_encoders()
    found = {name: p.grad.clone() for name, p in t.clt.named_parameters() if p.grad is not None}
    for index in range(len(t.clt.sites)):
        found[f"W_dec of {index}"] = torch.cat([chunk.gradient for chunk in noted.chunks(index)])
    return found | {f"loss term {name}": term for name, term in terms.items()}


@pytest.mark.parametrize("attention", ["frozen", "latents"])
@pytest.mark.parametrize("policy", ["top", "learned", "none"])
def test_micro_batches_have_the_gradient_of_the_whole_batch(tmp_path, attention, policy):
    t = trainer(tmp_path, "gpt2", attention, policy)
    activations = warmed_up(t)
    whole = gradients_of(t, activations, 3)
    for rows in (1, 2):
        for name, gradient in gradients_of(t, activations, rows).items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_micro_batches_have_the_gradient_of_the_cross_entropy(tmp_path):
    t = trainer(tmp_path)
    activations = warmed_up(t)
    t.objective.config = replace(t.config, loss=replace(t.config.loss, cross_entropy_weight=0.5))
    whole, parts = (gradients_of(t, activations, rows) for rows in (3, 2))
    assert whole["loss term cross_entropy_sparse"] > 0
    for name, gradient in parts.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", torch.float32)


@pytest.fixture
def memory_for(monkeypatch):
    """Lets passes over more than so many rows run out of memory."""

    def limit(rows: int) -> None:
        passes = Objective.passes

        def limited(self, activations, gradients=None):
            if len(activations.tokens) > rows:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return passes(self, activations, gradients)

        monkeypatch.setattr(Objective, "passes", limited)

    return limit


def test_a_step_that_runs_out_of_memory_goes_on_in_micro_batches(tmp_path, model, memory_for):
    halves = small_trainer(tmp_path / "halves", model, batch_rows=4, compute=ComputeConfig(micro_batch_rows=2))
    halves.fit()
    memory_for(2)
    t = small_trainer(tmp_path / "short", model, batch_rows=4)
    with pytest.warns(UserWarning, match="out of memory; going on in micro-batches of 2 rows"):
        t.fit()
    expected, got = whole_state(halves), whole_state(t)
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_resumed_run_keeps_the_micro_batches_it_went_on_in(tmp_path, model, memory_for):
    memory_for(2)
    t = small_trainer(tmp_path, model, batch_rows=4)
    with pytest.warns(UserWarning, match="micro-batches of 2 rows"):
        t.fit()
    again = small_trainer(tmp_path, model, batch_rows=4)
    again.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.train_step(again.batches.capture(ROWS[:4]))


def test_a_step_that_runs_out_of_memory_twice_fails_with_plan_and_advice(tmp_path, model, monkeypatch, memory_for):
    t = small_trainer(tmp_path, model, batch_rows=4, checkpoints=CheckpointConfig(every_steps=2))
    step = t.train_step

    def ever_shorter_of_memory(activations):
        if t.step in (3, 5):
            memory_for({3: 2, 5: 1}[t.step])
        return step(activations)

    t.train_step = ever_shorter_of_memory
    with pytest.warns(UserWarning, match="micro-batches of 2 rows"), pytest.raises(memory.OutOfMemory) as error:
        t.fit()
    assert "step 5: out of memory, in micro-batches of 2 rows" in str(error.value)
    assert "each change on top of the ones before, least harmful first: --model.dtype bf16" in str(error.value)
    assert "| **peak**" in str(error.value)
    _, numbers = load_state(latest(tmp_path))
    assert numbers["step"] == 4


def test_running_out_of_memory_in_the_update_fails_with_plan_and_advice(tmp_path, model, monkeypatch):
    t = small_trainer(tmp_path, model)

    def short(*arguments, **keywords):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(optim.RowAdam, "update", short)
    with pytest.raises(memory.OutOfMemory, match="step 0: out of memory"):
        t.fit()


def test_other_errors_of_a_step_are_passed_on(tmp_path, model, monkeypatch):
    t = small_trainer(tmp_path, model)
    monkeypatch.setattr(Objective, "passes", lambda *a: (_ for _ in ()).throw(RuntimeError("shapes")))
    with pytest.raises(RuntimeError, match="^shapes$"):
        t.fit()


def test_advice_begins_with_micro_batches():
    config = replace(TrainConfig(), batch_rows=64, clt=CLTConfig(latents=512, active=16))
    shape = ModelShape(12, 256)
    peak = memory.make_plan(config, shape).peak
    change, then = memory.advice(config, shape, peak - 1)[0]
    assert change == "--compute.micro-batch-rows 32" and then < peak


def test_a_step_that_really_runs_out_of_memory_goes_on_in_micro_batches():
    """The highest limit of the address space that is too low for the whole batch leaves room for its halves."""
    script = textwrap.dedent(f"""
        import json, os, resource, sys, warnings
        sys.path[:0] = {sys.path!r}
        import torch
        from types import SimpleNamespace
        import test_plan
        from sparseclt.model.shape import ModelShape
        from sparseclt.training import memory
        from sparseclt.training.trainer import Trainer
        L, D, rows = 8, 16, 96
        shape = ModelShape(layers=L, d_model=D, heads=1, vocab=1)
        batch = test_plan.activations(L, D, rows)
        def trainer(micro):
            config = test_plan.configured(F=256, K=32, rows=rows, micro=micro)
            model = SimpleNamespace(shape=shape, tokenizer=None)
            return Trainer(config, language_model=model, rows=torch.zeros(rows, test_plan.S))
        def peak(micro):
            t = trainer(micro)
            t.train_step(batch)
            with test_plan.peak_allocation() as bytes_:
                t.train_step(batch)
            return bytes_[0], t
        (whole, _), (halves, expected) = peak(None), peak(rows // 2)
        assert halves < 0.9 * whole, (halves, whole)
        def step_under(limit):
            # The warnings of a step in so many bytes of address space, and how far its parameters are from those
            # expected; None, if it fails. In a process of its own, so that each limit meets the same free memory.
            read, write = os.pipe()
            if not (child := os.fork()):
                t = trainer(None)
                t.train_step(batch)
                used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    try:
                        t.train_step(batch)
                    except memory.OutOfMemory:
                        os._exit(1)
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                pairs = zip(t.clt.parameters(), expected.clt.parameters())
                difference = max(float((a - b).abs().max()) for a, b in pairs)
                os.write(write, json.dumps([[str(w.message) for w in caught], difference]).encode())
                os._exit(0)
            os.close(write)
            with os.fdopen(read) as result:
                found = result.read()
            os.waitpid(child, 0)
            return json.loads(found) if found else None
        # Allocations that find room in what the process has already are not counted: the limit lies below `whole`, and
        # below 0 if there is much room.
        low, high, at_low = -3 * whole, whole, "never failed"
        while high - low > (whole - halves) // 4:
            middle = (low + high) // 2
            if not (found := step_under(middle)) or found[0]:
                low, at_low = middle, found
            else:
                high = middle
        print(json.dumps([whole, halves, at_low]))
    """)
    # Every tensor in pages of its own: what is freed is given back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    whole, halves, at_limit = json.loads(done.stdout.strip().splitlines()[-1])
    assert whole > 1.1 * halves, "the test must be able to tell"
    if at_limit == "never failed":
        pytest.skip(f"the process held more than {4 * whole >> 20} MiB of free memory, so that no limit reached a step")
    assert at_limit, "where the whole batch has no room, its halves have none either"
    messages, difference = at_limit
    assert ["out of memory; going on in micro-batches of 48 rows" in m for m in messages] == [True]
    assert difference < 1e-5
