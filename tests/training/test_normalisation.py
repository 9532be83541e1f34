"""What a CLT learns does not depend on the units of the model's activations."""

from dataclasses import replace

import pytest
import torch
from clts import language_model
from test_decoder_gradients import trainer as exact_trainer
from test_optim import clt_with
from test_trainer import ROWS, config
from tiny_models import config as model_config
from tiny_models import hf_model, tokenizer

from sparseclt.config import CLTConfig, ConnectionConfig, OptimizerConfig
from sparseclt.evaluation.metrics import evaluate
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.training import trainer as training
from sparseclt.training.normalisation import site_scales
from sparseclt.training.trainer import Trainer

UNITS = (0.01, 1.0, 30.0)


def trained_fvu(out, model, **changes) -> dict[str, float]:
    optimizer = OptimizerConfig(learning_rate=2e-2)
    t = Trainer(config(out, steps=16, optimizer=optimizer, **changes), language_model=model, rows=ROWS)
    for activations in t.batches.from_step(0):
        t.train_step(activations)
    mean = evaluate(t.clt, model, ROWS, cross_entropy=False).mean
    return {name: value for name, value in vars(mean).items() if name.startswith("fvu") and value is not None}


def test_the_units_of_mlp_outputs_leave_the_fvu_as_it_is(tmp_path):
    model = language_model("gpt2", torch.float32)
    capture, found = model.capture, []
    for unit in UNITS:

        def scaled(tokens, unit=unit, **rest):
            activations = capture(tokens, **rest)
            return replace(activations, mlp_out=[y * unit for y in activations.mlp_out])

        model.capture = scaled
        found.append(trained_fvu(tmp_path / str(unit), model, connections=ConnectionConfig(policy="none")))
    assert found[1]["fvu_vanilla"] < 0.95, "it has learned something"
    for other in (found[0], found[2]):
        assert other["fvu_vanilla"] == pytest.approx(found[1]["fvu_vanilla"], rel=0.02)


def model_with_residual_in(unit: float) -> LanguageModel:
    """A Llama whose embedding, attention outputs and MLP outputs are so many times larger; RMSNorm takes that out."""
    shape = model_config("llama")
    shape.rms_norm_eps = 1e-12
    hf = hf_model(shape, dtype=torch.float32)
    with torch.no_grad():
        hf.model.embed_tokens.weight.mul_(unit)
        for layer in hf.model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                for parameter in linear.parameters():
                    parameter.mul_(unit)
    return LanguageModel.from_hf(hf, tokenizer(), name="llama")


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_the_units_of_the_residual_stream_leave_the_fvu_of_both_modes_as_it_is(tmp_path, attention):
    found = [
        trained_fvu(tmp_path / str(unit), model_with_residual_in(unit), clt=CLTConfig(24, 3, attention=attention))
        for unit in UNITS
    ]
    for mode in ("vanilla", "sparse"):
        assert found[1][f"fvu_{mode}"] < 0.95, "it has learned something"
        for other in (found[0], found[2]):
            assert other[f"fvu_{mode}"] == pytest.approx(found[1][f"fvu_{mode}"], rel=0.02)


def test_scales_are_root_mean_squares_over_the_tokens_that_count():
    model = language_model("gpt2")
    activations = model.capture(ROWS[:4], attention=True)
    clt = training.build_clt(config("unused", clt=CLTConfig(24, 3, attention="latents")), model)
    activations.mlp_out[0][:, 0] *= 1000
    inputs, outputs = site_scales(clt, activations)
    for i, site in enumerate(clt.sites):
        x = (activations.x if site.kind == "mlp" else activations.attn_out)[site.layer][:, 1:].reshape(-1, 32)
        y = (activations.mlp_out if site.kind == "mlp" else activations.attn_out)[site.layer][:, 1:].reshape(-1, 32)
        assert inputs[i].item() == pytest.approx(x.square().mean().sqrt().item())
        assert outputs[i].item() == pytest.approx((y - y.mean(0)).square().mean().sqrt().item())
    activations.mlp_out[1][:] = 3.0
    assert site_scales(clt, activations).outputs[3] == 1, "constant"


def test_training_is_that_of_a_clt_on_normalised_activations(tmp_path, monkeypatch):
    ours, twin = (exact_trainer(tmp_path / name, policy="none") for name in ("ours", "twin"))
    activations = ours.batches.capture(next(ours.batches.stream_at(0)))
    activations = replace(
        activations, x=[(layer + 2) * x for layer, x in enumerate(activations.x)],
        mlp_out=[y / (10 * layer + 7) for layer, y in enumerate(activations.mlp_out)],
    )  # fmt: skip
    inputs, outputs = site_scales(ours.clt, activations)
    normalised = replace(
        activations, x=[x / s for x, s in zip(activations.x, inputs, strict=True)],
        mlp_out=[y / s for y, s in zip(activations.mlp_out, outputs, strict=True)],
    )  # fmt: skip
    run(ours, activations)
    monkeypatch.setattr(training, "normalise", lambda *arguments: None)
    run(twin, normalised)
    for i, (module, other) in enumerate(zip(ours.clt, twin.clt, strict=True)):
        for one, two in [
            (module.W_enc * inputs[i], other.W_enc), (module.b_enc, other.b_enc),
            (module.W_dec / outputs[i:, None], other.W_dec), (module.b_dec / outputs[i], other.b_dec),
        ]:  # fmt: skip
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def run(t: Trainer, activations: Activations) -> None:
    for _ in range(6):
        metrics = t.train_step(activations)
    assert metrics["gradient_norm"] > t.config.optimizer.clip_norm, "clipping takes part"


OPTIONS = {
    "fp32": {}, "8bit": {"state": "8bit"}, "touched": {"rows": "touched"},
    "8bit, touched": {"state": "8bit", "rows": "touched"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_kind_of_state_takes_its_steps_in_normalised_units(options, dtype):
    """Powers of two: nothing is rounded, so weights are equal to the bit."""
    scale = torch.tensor([[0.25], [64.0]])
    (scaled, ours, name), (plain, other, _) = (clt_with(40, **OPTIONS[options]) for _ in range(2))
    ours.data = (ours.data * scale).to(dtype)
    other.data = other.data.to(dtype)
    scaled.scales[name].copy_(scale)
    for step in range(1, 9):
        gradient = torch.randn(40, 2, 3, generator=torch.Generator().manual_seed(step))
        touched = torch.arange(40) % (step % 3 + 1) == 0
        for optimizer, own in ((scaled, gradient / scale), (plain, gradient)):
            optimizer.step = step
            norm = optimizer.square_sum(name, own)
            torch.testing.assert_close(norm, gradient.square().sum())
            for rows in (slice(0, 16), slice(16, 40)):
                optimizer.update(name, own[rows].clone(), 0.01, rows, touched[rows])
    assert torch.equal(ours.float(), other.float() * scale)


def test_a_resumed_run_goes_on_with_the_scales_of_its_first_batch(tmp_path):
    model = language_model("gpt2", torch.float32)
    t = Trainer(config(tmp_path), language_model=model, rows=ROWS)
    t.fit()
    again = Trainer(config(tmp_path), language_model=model, rows=ROWS)
    again.load(tmp_path)
    for name, scale in t.optimizer.scales.items():
        assert scale.ne(1).all() and torch.equal(scale, again.optimizer.scales[name])
