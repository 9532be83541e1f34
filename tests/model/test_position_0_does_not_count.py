"""Position 0 of a row, where many models have one activation a thousand times larger than elsewhere, takes part neither
in losses nor in figures."""

from dataclasses import replace

import pytest
import torch
from clts import connect_random, language_model, open_all, random_clt, tokens
from test_trainer import config

from sparseclt.config import ActivationConfig
from sparseclt.connections.activity import Activity, RecentLatents
from sparseclt.evaluation.metrics import evaluate
from sparseclt.model.activations import Activations, all_but_first
from sparseclt.model.replacement import replacement
from sparseclt.training.trainer import Trainer

ROWS = tokens(rows=6, length=12)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


def with_massive_first(activations: Activations, factor: float = 1000.0) -> Activations:
    """The same, with everything that the model computed at position 0 so many times larger."""

    def massive(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[:, 0] *= factor
        return tensor

    return replace(
        activations, x=[massive(t) for t in activations.x], scale=activations.scale, r_0=massive(activations.r_0),
        mlp_out=[massive(t) for t in activations.mlp_out], attn_out=[massive(t) for t in activations.attn_out],
    )  # fmt: skip


def small_trainer(out, model, **changes) -> Trainer:
    return Trainer(config(out, **changes), language_model=model, rows=ROWS)


@pytest.mark.parametrize("mode", ["vanilla", "sparse"])
@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_a_pass_has_no_latents_there_and_keeps_the_models_own_outputs(model, attention, mode):
    clt = random_clt(model, attention)
    connect_random(clt, 6)
    activations = model.capture(ROWS, attention=True)
    assert not activations.counted[:, 0].any() and activations.counted[:, 1:].all()
    first = ~activations.counted.flatten()
    forward, every = clt(activations, mode), clt(replace(activations, counted=None), mode)
    for site, latents, all_latents in zip(clt.sites, forward.latents, every.latents, strict=True):
        assert not latents.values[first].any() and latents.values[~first].any()
        assert torch.equal(forward.output(site)[first], activations.output(site)[first])
        if attention == "frozen" or mode == "vanilla":  # elsewhere nothing has changed
            assert torch.equal(latents.values[~first], all_latents.values[~first])
            assert torch.equal(forward.output(site)[~first], every.output(site)[~first])


def test_attention_latents_read_the_models_own_stream_there(model):
    """With the upstream's real outputs at the other tokens as well (error nodes), both modes agree."""
    clt = random_clt(model, "latents")
    open_all(clt)
    activations = model.capture(ROWS, attention=True)
    vanilla, sparse = clt(activations, "vanilla"), clt(activations, "sparse", error_nodes=True)
    for a, b in zip(vanilla.latents, sparse.latents, strict=True):
        torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-10)
    # And without latents anywhere the sparse stream at position 0 is still the real one.
    plain, shifted = clt(activations, "sparse"), clt(activations, "sparse", error_nodes=True)
    first = ~activations.counted.flatten()
    torch.testing.assert_close(plain._readings[-1][first], shifted._readings[-1][first])


def test_the_replaced_model_keeps_its_own_outputs_there(model):
    clt = random_clt(model)
    connect_random(clt, 6)
    real = model.replaced_logits(ROWS)
    for mode in ("vanilla", "sparse"):
        replaced = model.replaced_logits(ROWS, **replacement(clt, mode))
        torch.testing.assert_close(replaced[:, 0], real[:, 0])
        assert not torch.allclose(replaced[:, 1], real[:, 1])


def test_zero_ablation_keeps_the_models_own_outputs_there_and_cross_entropy_leaves_it_out(model):
    result = evaluate(random_clt(model), model, ROWS).cross_entropy

    def ablated(layer, live):
        output = torch.zeros_like(live.mlp_out[-1])
        output[:, 0] = live.mlp_out[-1][:, 0]
        return output

    def by_hand(**hooks):
        logits = model.replaced_logits(ROWS, **hooks)[:, 1:-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ROWS[:, 2:].flatten()).item()

    assert result.model == pytest.approx(by_hand())
    assert result.zero_ablated == pytest.approx(by_hand(on_mlp=ablated))
    with pytest.raises(ValueError, match="tokens: expected rows of at least 3 tokens, .* got 2"):
        model.cross_entropy(ROWS[:, :2])


@pytest.mark.parametrize("micro_rows", [6, 2])
def test_a_massive_activation_there_leaves_loss_and_gradients_as_they_are(tmp_path, model, micro_rows):
    t = small_trainer(tmp_path, model, batch_rows=6)
    t.clt.double()
    connect_random(t.clt, 5)
    t.objective.micro_rows = micro_rows

    def gradients(activations: Activations) -> dict[str, torch.Tensor]:
        t.clt.zero_grad()
        noted, terms, *_ = t.objective.backward(activations, 0.7, lambda total, terms: None)
        noted.add_to_encoders()
        found = {name: p.grad.clone() for name, p in t.clt.named_parameters() if p.grad is not None}
        for index in range(len(t.clt.sites)):
            found[f"W_dec of {index}"] = torch.cat([chunk.gradient for chunk in noted.chunks(index)])
        return found | terms

    activations = model.capture(ROWS)
    plain, massive = gradients(activations), gradients(with_massive_first(activations))
    assert plain["fvu_sparse/mlp_2"] > 0
    for name, value in plain.items():
        torch.testing.assert_close(massive[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_massive_activation_there_spoils_no_other_token(tmp_path, model):
    """Trained with one at position 0 of every row, a CLT has the same FVU."""
    single = language_model(model.shape.name, torch.float32)
    fvu, capture = {}, single.capture
    for factor in (1.0, 1000.0):
        single.capture = lambda batch, factor=factor, **rest: with_massive_first(capture(batch, **rest), factor)
        t = small_trainer(tmp_path / str(factor), single, steps=20)
        for activations in t.batches.from_step(0):
            t.train_step(activations)
        fvu[factor] = evaluate(t.clt, single, ROWS, cross_entropy=False).mean
    for mode in ("vanilla", "sparse"):
        one, other = (getattr(mean, f"fvu_{mode}") for mean in fvu.values())
        assert other == pytest.approx(one, rel=1e-3)


def test_figures_leave_it_out(model):
    clt = random_clt(model)
    connect_random(clt, 6)
    result = evaluate(clt, model, ROWS, batch_rows=4, cross_entropy=False)
    assert result.tokens == 6 * 11
    activations = model.capture(ROWS)
    counted = activations.counted.flatten()
    for m, site in enumerate(clt.sites):
        y, forward = activations.output(site)[counted], clt(activations, "vanilla")
        error = (y - forward.output(site)[counted]).square().sum() / (y - y.mean(0)).square().sum()
        assert result.modules[m].fvu_vanilla == pytest.approx(error.item())
        assert result.modules[m].l0_vanilla == pytest.approx((forward.latents[m].values > 0).sum().item() / len(y))


def test_activity_leaves_it_out(model):
    clt = random_clt(model)
    activations = model.capture(ROWS)
    counted = activations.counted.flatten()
    every, some = (Activity(3, 20, recent=RecentLatents(clt.sites, 5, 40)) for _ in range(2))
    latents = clt(activations, "vanilla").latents
    every.update(latents, counted)
    some.update([type(z)(z.values[counted], z.indices[counted]) for z in latents])
    for name, value in some.state().items():
        torch.testing.assert_close(every.state()[name], value, msg=name)
    assert every.tokens_since_fired.max() == 66 or every.tokens_since_fired.max() == 0


@pytest.mark.parametrize("source", ["cache", "shuffled", "cached and shuffled"])
def test_cached_and_shuffled_activations_know_it(tmp_path, source):
    model = language_model("gpt2", torch.float32)
    bytes_ = 1 << 20 if "shuffled" in source else 0
    cache = str(tmp_path / "cache") if "cache" in source else None
    t = small_trainer(tmp_path, model, activations=ActivationConfig(shuffle_bytes=bytes_, cache=cache))
    embedding = model.capture(ROWS).r_0[:, 0].flatten(0, -2)  # position 0 has a position embedding of its own
    first = {tuple(row.tolist()) for row in embedding.bfloat16()}
    batches = list(t.batches.from_step(0))
    assert sum(batch.counted_tokens for batch in batches) < sum(batch.tokens.numel() for batch in batches)
    for batch in batches:
        for vector, counts in zip(batch.r_0.flatten(0, 1).bfloat16(), batch.counted.flatten(), strict=True):
            assert bool(counts) == (tuple(vector.tolist()) not in first)


def test_all_but_first():
    assert all_but_first(torch.zeros(2, 3, dtype=torch.int64)).tolist() == [[False, True, True]] * 2
