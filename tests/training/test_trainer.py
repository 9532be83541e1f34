"""Training: what a step does, exact continuation, and stopping before damage is done."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from clts import language_model
from tiny_models import tokens

from sparseclt.config import (
    CheckpointConfig,
    CLTConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from sparseclt.model.clt import SparseCLT
from sparseclt.model.sites import MODES
from sparseclt.storage.checkpoint import latest, load_state
from sparseclt.storage.clt_files import load_clt
from sparseclt.training.finite import Checks, NonFiniteError
from sparseclt.training.loggers import read_metrics
from sparseclt.training.trainer import Trainer

ROWS = tokens(rows=30, length=12)


def config(out: Path, **changes) -> TrainConfig:
    base = TrainConfig(
        out=str(out), steps=8, batch_rows=2, checkpoints=CheckpointConfig(every_steps=4),
        logging=LoggingConfig(every_steps=1, progress=False),
        clt=CLTConfig(latents=24, active=3), data=DataConfig(row_tokens=12),
        connections=ConnectionConfig(per_latent=5, start_per_latent=9, refresh_steps=3),
        loss=LossConfig(sparse_start_share=0.0), optimizer=OptimizerConfig(dead_after_tokens=60),
    )  # fmt: skip
    return replace(base, **changes)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", torch.float32)


def trainer(out: Path, model, **changes) -> Trainer:
    return Trainer(config(out, **changes), language_model=model, rows=ROWS)


def whole_state(t: Trainer) -> dict[str, torch.Tensor]:
    state = {f"clt/{k}": v for k, v in t.clt.state_dict().items()}
    state |= {f"optimizer/{name}": tensor.float() for name, tensor in t.optimizer.tensors().items()}
    for mode in MODES:
        state |= {f"activity/{mode}/{k}": v for k, v in t.activity[mode].state().items()}
    for module in t.clt:
        if module.connections:
            state[f"connections/{module.site.name}"] = module.connections.indices.long()
    return state


POLICIES = {
    "top": ConnectionConfig(per_latent=5, start_per_latent=9, refresh_steps=3),
    "learned": ConnectionConfig(policy="learned", per_latent=9, candidates_after_steps=2),
    "dense-learned": ConnectionConfig(policy="dense-learned"),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, model, policy):
    connections = POLICIES[policy]
    whole = trainer(tmp_path / "whole", model, connections=connections)
    whole.fit()

    first = trainer(tmp_path / "cut", model, connections=connections)
    original, stop_at = first.train_step, 6  # past the checkpoint of step 4

    def stops(activations):
        if first.step == stop_at:
            raise KeyboardInterrupt
        return original(activations)

    first.train_step = stops
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = trainer(tmp_path / "cut", model, connections=connections)
    torch.rand(3)  # another state of the generator than where the first run stood
    second.fit(resume=tmp_path / "cut")

    expected, got = whole_state(whole), whole_state(second)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "cut" / "metrics.jsonl")


def test_a_run_killed_in_the_middle_leaves_a_checkpoint_that_continues(tmp_path, model):
    script = textwrap.dedent(f"""
        import os, signal, sys
        sys.path[:0] = {sys.path!r}
        import torch
        from pathlib import Path
        from test_trainer import config, language_model, trainer
        t = trainer(Path({str(tmp_path / "cut")!r}), language_model("gpt2", torch.float32))
        step = t.train_step
        t.train_step = lambda batch: os.kill(os.getpid(), signal.SIGKILL) if t.step == 6 else step(batch)
        t.fit()
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    )
    assert done.returncode == -signal.SIGKILL
    whole, resumed = trainer(tmp_path / "whole", model), trainer(tmp_path / "cut", model)
    whole.fit()
    resumed.fit(resume=tmp_path / "cut")
    expected, got = whole_state(whole), whole_state(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "cut" / "metrics.jsonl")


def test_the_same_seed_trains_the_same_clt(tmp_path, model):
    a, b = trainer(tmp_path / "a", model), trainer(tmp_path / "b", model)
    torch.rand(5)
    a.fit(), b.fit()
    assert all(torch.equal(x, y) for x, y in zip(whole_state(a).values(), whole_state(b).values(), strict=True))


def test_training_lowers_the_loss_of_both_modes(tmp_path, model):
    t = trainer(tmp_path, model, steps=120, checkpoints=CheckpointConfig(every_steps=120))
    t.fit()
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    for mode in MODES:
        assert metrics[-1][f"fvu_{mode}"] < 0.7 * metrics[5][f"fvu_{mode}"], mode


def test_the_language_model_runs_once_a_step(tmp_path, model, monkeypatch):
    calls = []
    capture = model.capture
    monkeypatch.setattr(model, "capture", lambda *a, **k: calls.append(1) or capture(*a, **k))
    forward = model.bridge.original_model.forward
    runs = []
    monkeypatch.setattr(model.bridge.original_model, "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    trainer(tmp_path, model).fit()
    assert len(calls) == 8 and len(runs) <= 8


def test_cross_entropy_through_the_replaced_model_reaches_every_parameter(tmp_path, model):
    t = trainer(
        tmp_path, model, loss=LossConfig(cross_entropy_weight=1.0, sparse_start_share=0.0, sparse_ramp_share=0.0)
    )
    for _ in range(2):
        metrics = t.train_step(t.batches.capture(next(t.batches.stream_at(t.step))))
    assert metrics["cross_entropy_sparse"] > 0
    activations = model.capture(ROWS[:2])
    total, terms, _ = t.loss(activations, 5)
    gradients = torch.autograd.grad(terms["cross_entropy_sparse"], [p for p in t.clt.parameters()], allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_both_kinds_of_attention_train_save_and_load(tmp_path, model, attention):
    t = trainer(tmp_path, model, clt=CLTConfig(latents=24, active=3, attention=attention))
    t.fit()
    loaded = SparseCLT.from_pretrained(tmp_path / "clt")
    activations = model.capture(ROWS[:2], attention=True)
    for mode in MODES:
        a, b = t.clt(activations, mode), loaded(activations, mode)
        for site in loaded.sites:
            assert torch.equal(a.output(site), b.output(site))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_activations_stop_training_and_name_layer_and_step(tmp_path, model, monkeypatch, bad):
    t = trainer(tmp_path, model)
    capture, batches = model.capture, iter(range(100))

    def poisoned(batch, **keywords):
        activations = capture(batch, **keywords)
        if next(batches) == 5:
            activations.mlp_out[1][0, 3, 2] = bad
        return activations

    monkeypatch.setattr(model, "capture", poisoned)
    with pytest.raises(NonFiniteError, match="step 5: the model's mlp_out of layer 1 has NaN or Inf"):
        t.fit()
    assert all(p.isfinite().all() for p in t.clt.parameters())
    _, numbers = load_state(latest(tmp_path))
    assert numbers["step"] == 4
    load_clt(latest(tmp_path))


def test_large_activations_are_not_taken_for_infinite_ones(model):
    activations = model.capture(tokens(4, 6))
    activations.mlp_out[1][0] = torch.finfo(torch.float32).max / 4  # their sum is infinite
    checks = Checks(activations, step=0)
    checks.note_loss(torch.zeros(()), {})
    assert checks.settle(torch.tensor(3.0)) == 3.0


def test_a_non_finite_loss_stops_before_the_optimiser_step(tmp_path, model):
    t = trainer(tmp_path, model)
    t.train_step(t.batches.capture(next(t.batches.stream_at(t.step))))
    with torch.no_grad():
        t.clt.transcoder(2).W_dec[0, 0, 0] = float("nan")
        t.clt.transcoder(2).b_enc[0] = 100.0
    before = [p.clone() for p in t.clt.parameters()]
    with pytest.raises(NonFiniteError, match="step 1: fvu_vanilla/mlp_2 is nan"):
        t.train_step(t.batches.capture(next(t.batches.stream_at(t.step))))
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, t.clt.parameters(), strict=True))


def test_a_run_directory_is_not_overwritten(tmp_path, model):
    trainer(tmp_path, model).fit()
    with pytest.raises(ValueError, match="out: .* already holds a run"):
        trainer(tmp_path, model).fit()


def test_more_connections_than_upstream_latents_says_how_many_there_are(tmp_path, model):
    with pytest.raises(ValueError, match=r"connections.per_latent: expected 0 to 48 .* got 49"):
        trainer(tmp_path, model, connections=ConnectionConfig(per_latent=49))


def test_rows_longer_than_the_context_are_refused(tmp_path, model):
    with pytest.raises(ValueError, match="data.row_tokens: expected at most the model's context of 24, got 25"):
        trainer(tmp_path, model, data=DataConfig(row_tokens=25))


def test_only_the_newest_checkpoints_stay(tmp_path, model):
    trainer(tmp_path, model, checkpoints=CheckpointConfig(every_steps=2)).fit()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000006", "step_00000008"]


def test_without_connections_only_vanilla_mode_is_trained(tmp_path, model):
    trainer(tmp_path, model, connections=ConnectionConfig(policy="none")).fit()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert "fvu_vanilla" in last and "fvu_sparse" not in last
