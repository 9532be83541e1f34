"""The row-wise optimiser against torch's Adam, its lazy and 8-bit forms, and rounding to bf16."""

import math

import pytest
import torch
from test_decoder_gradients import trainer, warmed_up
from torch.nn import Parameter

from sparseclt.config import CheckpointConfig, CLTConfig, LoggingConfig, OptimizerConfig, TrainConfig
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.ops._numba_decoder import Decoder
from sparseclt.training import eight_bit
from sparseclt.training.finite import NonFiniteError
from sparseclt.training.normalisation import normalise
from sparseclt.training.optimizer import RowAdam
from sparseclt.training.rounding import round_stochastically
from sparseclt.training.schedule import learning_rate


def weights(t) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in t.clt.named_parameters()}


def plain_steps(t, activations, steps: int) -> dict[str, torch.Tensor]:
    """The same training with autograd's gradients, `clip_grad_norm_` and `torch.optim.Adam`, which see the weights of
    normalised sites: what they are divided by their scale. Encoder rows without a gradient are put back."""
    normalise(t.clt, t.optimizer, activations)
    parameters, scales = dict(t.clt.named_parameters()), t.optimizer.scales
    own = {name: Parameter(p.detach() / scales.get(name, 1.0)) for name, p in parameters.items()}
    adam = torch.optim.Adam(own.values(), betas=t.config.optimizer.betas)
    for _ in range(steps):
        if t.policy:
            t.policy.update(t.clt, t.activity["vanilla"], t.step)
        adam.param_groups[0]["lr"] = learning_rate(t.config, t.step)
        t.clt.zero_grad()
        total, _, passes = t.loss(activations, t.step)
        total.backward()
        for name, parameter in parameters.items():
            own[name].grad = None if parameter.grad is None else parameter.grad * scales.get(name, 1.0)
        torch.nn.utils.clip_grad_norm_(own.values(), t.config.optimizer.clip_norm or math.inf)
        rested = {
            name: (value.detach().clone(), (value.grad == 0).view(len(value), -1).all(1))
            for name, value in own.items()
            if name.endswith(("W_enc", "b_enc")) and t.config.optimizer.rows != "all"
        }
        adam.step()
        with torch.no_grad():
            for name, (value, still) in rested.items():
                own[name][still] = value[still]
            for name, parameter in parameters.items():
                parameter.copy_(own[name] * scales.get(name, 1.0))
        for mode, forward in passes.items():
            t.activity[mode].observe(forward.latents, activations)
        t.step += 1
    return weights(t)


@pytest.mark.parametrize("attention, rows", [("frozen", "fired"), ("frozen", "all"), ("latents", "fired")])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("kept", [0, 1 << 30], ids=["computed twice", "kept"])
def test_steps_are_those_of_adam_on_normalised_sites_with_clipping(tmp_path, monkeypatch, clip, kept, attention, rows):
    monkeypatch.setattr("sparseclt.training.update.KEPT_BYTES", kept)
    monkeypatch.setattr("sparseclt.ops._numba_decoder.UPDATE_BYTES", 5000)  # a few latents at a time
    options = {"attention": attention, "optimizer": OptimizerConfig(clip_norm=clip, rows=rows)}
    ours, plain = trainer(tmp_path, **options), trainer(tmp_path, **options)
    activations = warmed_up(ours)
    expected = plain_steps(plain, activations, 4)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 10.0, 0.05])
def test_a_bound_of_the_norm_saves_a_pass_where_nothing_is_clipped(tmp_path, monkeypatch, clip):
    monkeypatch.setattr("sparseclt.training.update.KEPT_BYTES", 0)
    monkeypatch.setattr("sparseclt.ops._numba_decoder.UPDATE_BYTES", 5000)
    passes, squares, bounds = [], Decoder.squares, Decoder.most_squares
    monkeypatch.setattr(Decoder, "squares", lambda self: passes.append(squares(self)) or passes[-1])

    def most_squares(self):
        assert (bounds(self) >= squares(self)).all()
        return bounds(self)

    monkeypatch.setattr(Decoder, "most_squares", most_squares)
    options = {"policy": "none", "optimizer": OptimizerConfig(clip_norm=clip)}
    ours, plain = trainer(tmp_path, **options), trainer(tmp_path, **options)
    activations = warmed_up(ours)
    assert len(passes) == (4 * len(ours.clt.sites) if clip == 0.05 else 0)
    norm = ours.train_step(activations)["gradient_norm"]
    expected = plain_steps(plain, activations, 5)
    for name, value in weights(ours).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9)
    own = [p.grad * plain.optimizer.scales.get(name, 1.0) for name, p in plain.clt.named_parameters()]
    assert norm == pytest.approx(torch.nn.utils.get_total_norm(own).item(), rel=1e-6)


@pytest.mark.parametrize("backend", ["torch", "numba"])
@pytest.mark.parametrize("suffix, shape", [("W_enc", (4, 3)), ("b_enc", (4,))])
def test_encoder_rows_without_a_gradient_stay_and_their_moments_decay(backend, suffix, shape):
    torch.manual_seed(0)
    one, other = torch.nn.Module(), torch.nn.Module()
    for holder in (one, other):
        setattr(holder, suffix, Parameter(torch.ones(shape)))
    ours, plain = RowAdam(one, OptimizerConfig(), backend=backend), RowAdam(other, OptimizerConfig(rows="all"))
    parameter = getattr(one, suffix)
    for step, which in enumerate([[1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 0, 1]], 1):
        ours.step = plain.step = step
        fired = torch.tensor(which, dtype=torch.bool)
        gradient = torch.randn(shape) * fired.view(-1, *[1] * (len(shape) - 1))
        before = parameter.detach().clone()
        plain.update(suffix, gradient.clone(), 0.01)
        ours.update(suffix, gradient, 0.01)
        assert torch.equal(parameter[~fired], before[~fired])
        assert (parameter[fired] != before[fired]).all()
    torch.testing.assert_close(parameter[0], getattr(other, suffix)[0])
    assert not torch.allclose(parameter[1], getattr(other, suffix)[1]), "Adam drifts on"
    for key, truth in plain.state[suffix].items():
        torch.testing.assert_close(ours.state[suffix][key], truth)


def clt_with(count: int, **options) -> tuple[RowAdam, Parameter, str]:
    """An optimiser over one decoder [count, 2, 3]."""
    torch.manual_seed(0)
    holder = torch.nn.Module()
    holder.W_dec = Parameter(torch.randn(count, 2, 3))
    return RowAdam(holder, OptimizerConfig(**options)), holder.W_dec, "W_dec"


@pytest.mark.parametrize("uncounted", [(), ("cpu",)], ids=["gathered", "computed and dropped"])
def test_untouched_rows_stay_and_their_moments_decay_as_with_zero_gradients(uncounted, monkeypatch):
    monkeypatch.setattr("sparseclt.training.optimizer.UNCOUNTED", uncounted)
    lazy, parameter, name = clt_with(4, rows="touched")
    dense, copy, _ = clt_with(4)
    touched = [[1, 1, 0, 1], [1, 0, 0, 1], [1, 0, 0, 0], [1, 1, 0, 1]]
    for step, which in enumerate(touched, 1):
        lazy.step = dense.step = step
        mask = torch.tensor(which, dtype=torch.bool)
        gradient = torch.randn(4, 2, 3) * mask[:, None, None]
        before = parameter.detach().clone()
        dense.update(name, gradient.clone(), 0.01)
        lazy.update(name, gradient, 0.01, slice(0, 4), mask)
        assert torch.equal(parameter[~mask], before[~mask])
    assert torch.equal(parameter[2], clt_with(4)[1][2])
    torch.testing.assert_close(parameter[0], copy[0])
    assert not torch.allclose(parameter[1], copy[1]), "dense Adam drifts on"
    for key, truth in dense.state[name].items():
        torch.testing.assert_close(lazy.state[name][key][[0, 1, 3]], truth[[0, 1, 3]])


def test_eight_bit_moments_take_two_bytes_a_weight_and_follow_adam():
    optimizer, parameter, name = clt_with(50, state="8bit")
    plain, copy, _ = clt_with(50)
    start, sizes = parameter.detach().clone(), 10 ** torch.linspace(-3, 0, 3)
    for step in range(1, 301):
        optimizer.step = plain.step = step
        for own, weights in ((optimizer, parameter), (plain, copy)):
            noise = torch.randn(50, 2, 3, generator=torch.Generator().manual_seed(step))
            own.update(name, (weights.detach() + noise) * sizes, 0.01)
        if step == 1:
            torch.testing.assert_close(parameter, copy)
    moved = (copy - start).norm().item()
    assert (parameter - copy).norm().item() <= 0.05 * moved  # a column is 1000 times smaller than its vector's largest
    moments = (t for name, t in optimizer.tensors().items() if not name.endswith("/scale"))
    state = sum(t.numel() * t.element_size() for t in moments)
    assert state == parameter.numel() * 2 + 50 * 2 * 8


def test_eight_bit_moments_move_by_less_than_a_code():
    """The second entry's square shrinks by a thousandth a step, a sixteenth of a code; the first keeps the scale."""
    optimizer, _, name = clt_with(1, state="8bit", betas=(0.9, 0.999))
    gradient = torch.ones(1, 2, 3)
    for step in range(1, 1101):
        optimizer.step = step
        gradient[..., 1] = float(step <= 100)
        optimizer.update(name, gradient.clone(), 0.0)
    state = optimizer.state[name]
    square = eight_bit.decode(eight_bit.SQUARE, state["square"], state["square_scale"])
    expected = (1 - 0.999**100) * 0.999**1000
    torch.testing.assert_close(square[..., 1], torch.full((1, 2), expected), rtol=0.1, atol=0)
    mean = eight_bit.decode(eight_bit.MEAN, state["mean"], state["mean_scale"])
    torch.testing.assert_close(mean[..., 0], torch.ones(1, 2))
    assert mean[..., 1].abs().max() < 1e-4


def test_eight_bit_moments_of_untouched_rows_decay_as_with_zero_gradients():
    optimizer, _, name = clt_with(1, state="8bit", rows="touched")
    first, second = torch.randn(2, 1, 2, 3).unbind()
    for step, gradient in ((1, first), (8, second)):
        optimizer.step = step
        optimizer.update(name, gradient.clone(), 0.01, slice(0, 1), torch.ones(1, dtype=torch.bool))
    state = optimizer.state[name]
    mean = eight_bit.decode(eight_bit.MEAN, state["mean"], state["mean_scale"])
    torch.testing.assert_close(mean, 0.1 * (0.9**7 * first + second), rtol=0.05, atol=2e-3)


def test_rounding_to_bf16_takes_a_neighbour_and_keeps_the_mean():
    exact = torch.tensor([1.0, 1.001, -3.3, 1e-3, 0.0]).repeat(20_000, 1)
    out = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically(exact.clone(), out, torch.Generator().manual_seed(0))
    spacing = exact.abs() * 2**-7
    assert ((out.float() - exact).abs() <= spacing).all()
    assert torch.equal(out[:, [0, 4]].float(), exact[:, [0, 4]])
    assert len(out[:, 1].unique()) == 2
    error = (out.double() - exact.double()).mean(0).abs()
    assert (error <= 4 * spacing[0] / 20_000**0.5).all()


def test_updates_below_the_spacing_of_bf16_add_up():
    parameter = Parameter(torch.ones(1000, 1, 8, dtype=torch.bfloat16))
    holder = torch.nn.Module()
    holder.W_dec = parameter
    optimizer = RowAdam(holder, OptimizerConfig())
    for step in range(1, 101):
        optimizer.step = step
        optimizer.update("W_dec", torch.ones(1000, 1, 8), 1e-4)
    assert parameter.float().mean().item() == pytest.approx(1 - 100 * 1e-4, abs=5e-4)


@pytest.mark.parametrize("gathered", [False, True], ids=["in chunks", "gathered"])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(tmp_path, monkeypatch, gathered):
    t = trainer(tmp_path)
    activations = warmed_up(t)
    before, plain = weights(t), DecoderGradients.add_to_encoders

    def spoiled(self):
        plain(self)
        self.written[1][0].values[0, 0] = math.nan

    monkeypatch.setattr(DecoderGradients, "add_to_encoders", spoiled)
    if not gathered:
        monkeypatch.setattr(DecoderGradients, "gathered", lambda self, index: None)
    with pytest.raises(NonFiniteError, match=r"transcoders\.1\.W_dec"):
        t.train_step(activations)
    assert all(torch.equal(value, before[name]) for name, value in weights(t).items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_lean_run_continues_bit_exactly_and_learns(tmp_path, dtype):
    from dataclasses import replace

    from clts import language_model
    from tiny_models import tokens

    from sparseclt.training.trainer import Trainer

    base = trainer(tmp_path / "base").config
    config = replace(
        base, steps=12, checkpoints=CheckpointConfig(every_steps=6), clt=replace(base.clt, dtype=dtype),
        logging=LoggingConfig(every_steps=1, progress=False),
        optimizer=OptimizerConfig(state="8bit", rows="touched", learning_rate=1e-2),
    )  # fmt: skip
    model, rows = language_model("gpt2", torch.float32), tokens(3, 12)
    whole = Trainer(replace(config, out=str(tmp_path / "whole")), language_model=model, rows=rows)
    whole.fit()
    first = Trainer(replace(config, out=str(tmp_path / "half")), language_model=model, rows=rows)
    for _ in range(6):
        first.train_step(first.batches.capture(next(first.batches.stream_at(first.step))))
    first.out.mkdir()
    first.save()
    (first.out / "config.json").write_text((tmp_path / "whole" / "config.json").read_text())
    second = Trainer(replace(config, out=str(tmp_path / "half")), language_model=model, rows=rows)
    second.fit(resume=tmp_path / "half")
    assert all(p.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype] for p in whole.clt.parameters())
    for one, two in zip(whole.clt.parameters(), second.clt.parameters(), strict=True):
        assert torch.equal(one, two)
    from sparseclt.training.loggers import read_metrics

    losses = [line["fvu_vanilla"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_attention_latents_in_bf16_are_refused():
    with pytest.raises(ValueError, match="clt.dtype"):
        TrainConfig(clt=CLTConfig(attention="latents", dtype="bf16"))
