"""Mixed precision: products in bf16 with weights in fp32."""

import copy
from dataclasses import replace

import pytest
import torch
from clts import connect_random, language_model, random_clt
from test_trainer import ROWS, trainer, whole_state

from sparseclt.cli import main
from sparseclt.config import CLTConfig, ComputeConfig, ConnectionConfig, TrainConfig
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.shape import ModelShape
from sparseclt.model.sites import MODES
from sparseclt.training.memory_plan import make_plan
from sparseclt.training.precision import products

BF16 = ComputeConfig(precision="bf16")


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", torch.float32)


@pytest.fixture(scope="module")
def clt(model):
    """A CLT in training mode whose products round."""
    clt = random_clt(model)
    connect_random(clt, 6)
    clt.products = torch.bfloat16
    return clt.train()


@pytest.fixture(scope="module")
def batch(model):
    return model.capture(ROWS[:2])


def test_weights_are_read_in_bf16_and_biases_in_fp32(clt, batch):
    rounded, moved = copy.deepcopy(clt), copy.deepcopy(clt)
    with torch.no_grad():
        for module in rounded:
            module.W_enc.copy_(module.W_enc.bfloat16())
        for module in moved:
            module.b_enc.mul_(1 + 2.0**-12)
            module.b_dec.mul_(1 + 2.0**-12)
    expected, same, other = (c(batch, "vanilla") for c in (clt, rounded, moved))
    for site in clt.sites:
        assert torch.equal(expected.output(site), same.output(site))
        assert not torch.equal(expected.output(site), other.output(site))
        assert expected.output(site).dtype == torch.float32
    assert {z.values.dtype for z in expected.latents} == {torch.float32}


@pytest.mark.parametrize("mode", MODES)
def test_passes_agree_with_fp32_to_the_rounding_of_bf16(clt, batch, mode):
    exact = copy.deepcopy(clt)
    exact.products = None
    found, expected = clt(batch, mode), exact(batch, mode)
    for site in clt.sites:
        error = (found.output(site) - expected.output(site)).norm() / expected.output(site).norm()
        assert 1e-5 < error < 0.02, (site, error)


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_rounded_outside_training(clt, batch, mode):
    exact, trained = copy.deepcopy(clt).eval(), copy.deepcopy(clt).eval()
    exact.products = None
    for site in clt.sites:
        assert torch.equal(exact(batch, mode).output(site), trained(batch, mode).output(site))


def gradients(clt, batch, mode):
    """Of a random sum of a pass's outputs: decoders as the trainer has them, and everything else."""
    clt = copy.deepcopy(clt)
    noted = DecoderGradients(clt)
    forward = clt(batch, mode, gradients=noted)
    torch.manual_seed(0)
    torch.stack([(forward.output(s) * torch.randn(forward.output(s).shape)).sum() for s in clt.sites]).sum().backward()
    sharing = {grad.data_ptr() for written in noted.written for w in written for grad in w.grads}
    noted.add_to_encoders()
    found = {name: p.grad for name, p in clt.named_parameters() if p.grad is not None}
    for i in range(len(clt.sites)):
        found[f"W_dec {i}"] = torch.cat([chunk.gradient for chunk in noted.chunks(i)])
    return found, noted, sharing


@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_fp32_weights_and_modules_share_what_is_rounded_for_them(clt, batch, mode):
    exact = copy.deepcopy(clt)
    exact.products = None
    (found, noted, sharing), (expected, _, _) = gradients(clt, batch, mode), gradients(exact, batch, mode)
    assert {w.grads[0].dtype for written in noted.written for w in written} == {torch.bfloat16}
    assert len(sharing) == len(clt.sites)
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32
        # Latents that round differently change places among the K strongest.
        assert (found[name] - gradient).norm() <= 0.1 * gradient.norm(), name


def test_decoders_are_rounded_once_a_step_and_dropped_before_the_update(clt, batch):
    noted = DecoderGradients(clt)
    assert noted.decoder(0).dtype == torch.bfloat16 and noted.decoder(0) is noted.decoder(0)
    noted.add_to_encoders()
    assert not noted._decoders


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_a_run_trains_like_one_in_fp32(model, tmp_path, activation):
    losses = {}
    for precision in ("fp32", "bf16"):
        changes = {"clt": CLTConfig(latents=24, active=3, activation=activation), "steps": 6}
        t = trainer(tmp_path / precision, model, compute=ComputeConfig(precision=precision), **changes)
        losses[precision] = [t.train_step(batch)["loss"] for batch in t.batches.from_step(0)]
        assert {p.dtype for p in t.clt.parameters()} == {torch.float32}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["bf16"] != losses["fp32"]


def test_a_resumed_run_ends_with_the_same_bits(model, tmp_path):
    whole = trainer(tmp_path / "run", model, compute=BF16)
    whole.fit()
    resumed = trainer(tmp_path / "run", model, compute=BF16)
    resumed.fit(tmp_path / "run", checkpoint="step_00000004")
    expected, found = whole_state(whole), whole_state(resumed)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_micro_batches_have_the_gradient_of_the_whole_batch(model, tmp_path):
    weights = {}
    for rows in (None, 1):
        compute = replace(BF16, micro_batch_rows=rows)
        t = trainer(tmp_path / str(rows), model, steps=1, compute=compute, connections=ConnectionConfig(policy="none"))
        t.fit()
        weights[rows] = t.optimizer.tensors()
    for name, moment in weights[None].items():
        torch.testing.assert_close(weights[1][name], moment, rtol=0.02, atol=1e-4 * moment.abs().max().item())


def test_automatic_precision_is_bf16_on_a_gpu_that_has_it(monkeypatch):
    plain, gpu = TrainConfig(device="cpu"), TrainConfig(device="cuda")
    assert products(plain) is None and products(replace(plain, compute=BF16)) == torch.bfloat16
    assert products(gpu) == torch.bfloat16  # not here: taken for one
    assert products(replace(gpu, compute=ComputeConfig(precision="fp32"))) is None
    assert products(replace(gpu, clt=CLTConfig(attention="latents"))) is None
    assert products(replace(gpu, clt=CLTConfig(dtype="bf16"))) is None  # the weights are
    monkeypatch.setattr("sparseclt.training.precision.has_bf16", lambda device: False)
    assert products(gpu) is None


def test_the_plan_counts_the_copies_in_bf16(capsys):
    shape = ModelShape(layers=4, d_model=64)
    exact, mixed = (
        make_plan(TrainConfig(device="cpu", compute=ComputeConfig(precision=precision)), shape)
        for precision in ("fp32", "bf16")
    )
    terms = {term.name: term for term in mixed.terms}
    weights = next(term.bytes for term in exact.terms if term.name == "weights")
    assert terms["weights"].bytes == weights
    assert terms["decoders in bf16"].bytes == 2 * 1024 * 64 * (4 + 3 + 2 + 1)
    assert terms["encoders in bf16"].bytes == 2 * 2 * 1024 * 64 * 4
    assert mixed.phase("update") < exact.phase("update")
    assert main(["plan", "--device", "cuda", "--memory-gib", "24"]) == 0
    assert "decoders in bf16" in capsys.readouterr().out
