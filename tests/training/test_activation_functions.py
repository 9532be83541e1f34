"""Training with BatchTopK and JumpReLU: both modes, thresholds in the files, exact continuation."""

from dataclasses import replace

import pytest
import torch
from clts import language_model
from safetensors.torch import load_file
from test_trainer import ROWS, config, trainer, whole_state

from sparseclt.config import (
    CheckpointConfig,
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from sparseclt.evaluation.metrics import evaluate
from sparseclt.evaluation.pruning import fvu_against_c
from sparseclt.model.clt import SparseCLT
from sparseclt.model.sites import MODES
from sparseclt.training import memory
from sparseclt.training.loggers import read_metrics
from sparseclt.training.objective import Objective
from sparseclt.training.thresholds import calibrate
from sparseclt.training.trainer import Trainer

ACTIVATIONS = ("batchtopk", "jumprelu")
F, K = 40, 3
LOSS = LossConfig(sparse_start_share=0.0, l0_weight=10.0)  # for very few tokens


def clt_config(activation: str, **changes) -> CLTConfig:
    return CLTConfig(latents=F, active=K, activation=activation, **changes)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", torch.float32)


@pytest.fixture(scope="module", params=ACTIVATIONS)
def trained(request, tmp_path_factory, model) -> Trainer:
    t = trainer(
        tmp_path_factory.mktemp(request.param), model, clt=clt_config(request.param, bandwidth=0.5), steps=60,
        batch_rows=6, loss=LOSS, checkpoints=CheckpointConfig(every_steps=60),
        optimizer=OptimizerConfig(learning_rate=2e-3),  # slow enough for a mean over ten of so few steps
    )  # fmt: skip
    t.fit()
    return t


def test_training_lowers_the_fvu_of_both_modes(trained):
    metrics = read_metrics(trained.out / "metrics.jsonl")
    for mode in MODES:
        assert metrics[-1][f"fvu_{mode}"] < 0.8 * metrics[5][f"fvu_{mode}"], mode
        assert 0 <= metrics[-1][f"full_{mode}"] <= 1
        if trained.config.clt.activation == "batchtopk":
            assert all(m[f"l0_{mode}"] == K for m in metrics if f"l0_{mode}" in m)


def test_the_l0_penalty_moves_thresholds_until_k_latents_are_active(tmp_path, model):
    t = trainer(tmp_path, model, clt=clt_config("jumprelu", bandwidth=0.5), loss=LOSS)
    activations = model.capture(ROWS)
    calibrate(t.clt, activations)
    thresholds = [module.threshold for module in t.clt]

    def l0() -> list[float]:
        tokens = activations.counted_tokens
        return [float(l0.detach().sum()) / tokens for l0 in t.clt(activations, "vanilla").l0]

    wanted = [t.clt.architecture.active_of(site.layer) for site in t.clt.sites]
    assert l0() == pytest.approx(wanted, rel=0.02)
    with torch.no_grad():
        for threshold, factor in zip(thresholds, (0.3, 0.6, 1.3), strict=True):
            threshold.mul_(factor)
    before = [found / k for found, k in zip(l0(), wanted, strict=True)]
    assert max(before) > 2 and min(before) < 0.7
    optimizer = torch.optim.Adam(thresholds, lr=0.02)
    for _ in range(60):
        t.clt.zero_grad()
        terms = t.objective.terms(t.objective.passes(activations), activations, t.objective.means(activations))
        terms["l0_penalty_vanilla"].value(activations.counted_tokens).backward()
        optimizer.step()
    assert l0() == pytest.approx(wanted, rel=0.2)


def test_evaluation_uses_thresholds_and_leaves_training_mode_as_it_was(trained, model):
    trained.clt.train()
    one, many = (evaluate(trained.clt, model, ROWS, batch_rows=n, cross_entropy=False) for n in (1, 15))
    assert trained.clt.training
    for a, b in zip(one.modules, many.modules, strict=True):
        assert a.fvu_vanilla == pytest.approx(b.fvu_vanilla) and a.fvu_sparse == pytest.approx(b.fvu_sparse)
    last = read_metrics(trained.out / "metrics.jsonl")[-1]
    assert one.mean.fvu_vanilla < 1.3 * last["fvu_vanilla"] and one.mean.fvu_sparse < 1.3 * last["fvu_sparse"]
    assert one.mean.l0_vanilla == pytest.approx(last["l0_vanilla"], rel=0.35)
    assert one.mean.l0_sparse == pytest.approx(last["l0_sparse"], rel=0.35)
    (point,) = fvu_against_c(trained.clt, model, ROWS, [5])
    assert point["fvu_sparse"] < 1


def test_thresholds_are_in_the_files_where_circuit_tracer_reads_them(trained, model):
    path = trained.out / "clt"
    for layer, module in enumerate(trained.clt):
        stored = load_file(path / f"W_enc_{layer}.safetensors")
        assert torch.equal(stored[f"threshold_{layer}"], module.threshold) and (module.threshold > 0).all()
    assert "model_kind: cross_layer_transcoder\n" in (path / "config.yaml").read_text()
    loaded = SparseCLT.from_pretrained(path)
    assert loaded.architecture == trained.clt.architecture and not loaded.training
    assert loaded.architecture.activation == trained.config.clt.activation
    state, expected = loaded.state_dict(), trained.clt.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)
    trained.clt.eval()
    activations = model.capture(ROWS[:2])
    for mode in MODES:
        for site in loaded.sites:
            assert torch.equal(loaded(activations, mode).output(site), trained.clt(activations, mode).output(site))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_bit(tmp_path, model, activation, attention):
    clt = clt_config(activation, attention=attention)
    whole = trainer(tmp_path / "whole", model, clt=clt)
    whole.fit()
    first = trainer(tmp_path / "cut", model, clt=clt)
    original = first.train_step

    def stops(activations):
        if first.step == 6:  # past the checkpoint of step 4
            raise KeyboardInterrupt
        return original(activations)

    first.train_step = stops
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = trainer(tmp_path / "cut", model, clt=clt)
    second.fit(resume=tmp_path / "cut")
    expected, got = whole_state(whole), whole_state(second)
    assert expected.keys() == got.keys()
    assert any("threshold" in name for name in got)
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "cut" / "metrics.jsonl")


def test_micro_batches_of_jumprelu_have_the_gradient_of_the_whole_batch(tmp_path, model):
    def gradients(rows: int | None) -> dict[str, torch.Tensor]:
        t = trainer(
            tmp_path, model, clt=clt_config("jumprelu"), batch_rows=4, compute=ComputeConfig(micro_batch_rows=rows)
        )
        activations = model.capture(ROWS[:4])
        for _ in range(2):
            t.objective.micro_rows = 4
            t.train_step(activations)
        t.objective.micro_rows = rows or 4
        t.objective.backward(activations, 1.0, lambda *_: None)
        return {name: p.grad for name, p in t.clt.named_parameters() if p.grad is not None}

    whole, parts = gradients(None), gradients(1)
    assert whole.keys() == parts.keys() and any("threshold" in name for name in whole)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-6)


def test_micro_batches_of_batchtopk_are_refused(tmp_path, model, monkeypatch):
    with pytest.raises(ValueError, match=r"compute.micro_batch_rows: expected None with clt.activation 'batchtopk'"):
        config(tmp_path, clt=clt_config("batchtopk"), compute=ComputeConfig(micro_batch_rows=1))
    config(tmp_path, clt=clt_config("batchtopk"), compute=ComputeConfig(micro_batch_rows=2))  # a whole batch
    t = trainer(tmp_path, model, clt=clt_config("batchtopk"))

    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(Objective, "_backward", fails)
    with pytest.raises(memory.OutOfMemory, match="out of memory, in micro-batches of 2 rows"):
        t.train_step(model.capture(ROWS[:2]))


def test_tokens_that_use_all_their_slots_are_counted(tmp_path, model):
    t = trainer(tmp_path, model, clt=clt_config("jumprelu"))
    activations = model.capture(ROWS[:2])
    t.train_step(activations)
    with torch.no_grad():
        for module in t.clt:
            module.threshold.zero_()
            module.b_enc.fill_(100.0)
    metrics = t.train_step(activations)
    assert metrics["full_vanilla"] == 1 and metrics["l0_vanilla"] == 4 * K


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bf16_and_vanilla_mode_only_train_too(tmp_path, model, activation):
    clt = clt_config(activation, dtype="bf16")
    t = trainer(tmp_path, model, clt=clt, connections=ConnectionConfig(policy="none"))
    t.fit()
    loaded = SparseCLT.from_pretrained(t.out / "clt")
    for module, same in zip(t.clt, loaded, strict=True):
        assert module.threshold.dtype == torch.float32 and (module.threshold > 0).all()
        assert torch.equal(module.threshold, same.threshold) and same.W_enc.dtype == torch.bfloat16
    assert evaluate(t.clt, model, ROWS, cross_entropy=False).mean.fvu_sparse is None
    if activation == "batchtopk":
        assert all(torch.equal(m.threshold, m.threshold_sparse) for m in t.clt)


def test_topk_has_no_thresholds_and_remains_the_default():
    assert TrainConfig().clt.activation == "topk"
    with pytest.raises(ValueError, match="clt.bandwidth"):
        replace(CLTConfig(), bandwidth=0.0)
