"""The penalty on the Jacobian between latents: against the dense formula, in training, and in micro-batches."""

from dataclasses import replace

import pytest
import torch
from clts import F, K, language_model, random_clt, tokens
from test_decoder_gradients import trainer, warmed_up
from test_micro_batches import gradients_of

from sparseclt.model.clt import SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.training.interactions import jacobian_sums
from sparseclt.training.trainer import Trainer

ROWS = tokens(rows=2, length=8)


def clt_of(model, attention, targets) -> SparseCLT:
    clt = random_clt(model, attention)
    if targets == "all":
        return clt
    own = SparseCLT(replace(clt.architecture, targets="own")).double()
    with torch.no_grad():
        for module in own:
            for parameter in (module.b_enc, module.W_dec, module.b_dec):
                parameter.normal_(0, 0.3)
    return own


def dense_sums(clt, latents, activations) -> list[torch.Tensor]:
    norms = [module.W_dec.flatten(1).norm(dim=1) for module in clt]
    sums = []
    for m, module in enumerate(clt):
        if module.site.kind != "mlp" or not module.upstream:
            continue
        layer, writers = module.site.layer, list(clt)[: clt.upstream[m]]
        E = torch.cat([
            w.W_dec[:, 0] if w.site.kind == "attn" else w.W_dec[:, : layer - w.site.layer].sum(1) for w in writers
        ])  # fmt: skip
        V = norms[m][:, None] * (clt.reading_rows(m) @ E.T) / torch.cat(norms[: len(writers)])
        on = (latents[m].dense(F) > 0).double()
        on_up = torch.cat([z.dense(F) > 0 for z in latents[: len(writers)]], 1).double()
        per_token = torch.einsum("nf,nu,fu->n", on, on_up, V.abs()) / activations.scale[layer].flatten()
        sums.append(per_token.sum() / (K * K * len(writers)))
    return sums


@pytest.mark.parametrize(
    ("kind", "attention", "targets"),
    [("gpt2", "frozen", "all"), ("gpt2", "frozen", "own"), ("pythia", "latents", "all"), ("llama", "frozen", "all")],
)
def test_it_equals_the_dense_formula_with_its_gradient(kind, attention, targets):
    model = language_model(kind)
    clt, activations = clt_of(model, attention, targets), model.capture(ROWS, attention=attention == "latents")
    latents = clt(activations, "vanilla").latents
    ours, dense = jacobian_sums(clt, latents, activations), dense_sums(clt, latents, activations)
    assert len(ours) == len(dense) == 2
    weights = [p for module in clt for p in (module.W_enc, module.W_dec)]
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b)
        found, expected = (
            torch.autograd.grad(x, weights, retain_graph=True, allow_unused=True, materialize_grads=True)
            for x in (a, b)
        )
        torch.testing.assert_close(found, expected)


def test_stretching_latents_changes_nothing():
    model = language_model("gpt2")
    clt, activations = random_clt(model), model.capture(ROWS)
    before = jacobian_sums(clt, clt(activations, "vanilla").latents, activations)
    with torch.no_grad():
        for factor, module in zip((0.1, 3.0, 7.0), clt, strict=True):
            module.W_enc *= factor
            module.b_enc *= factor
            module.W_dec /= factor
    after = jacobian_sums(clt, clt(activations, "vanilla").latents, activations)
    torch.testing.assert_close(after, before)


def penalised(tmp_path, **options) -> Trainer:
    t = trainer(tmp_path, **options)
    t.objective.config = replace(t.config, loss=replace(t.config.loss, interaction_weight=0.5))
    return t


def test_decoders_get_its_gradient_once(tmp_path):
    t = penalised(tmp_path)
    activations = warmed_up(t)
    t.clt.zero_grad()
    total, values, _ = t.loss(activations, 5)
    expected = torch.autograd.grad(total, [module.W_dec for module in t.clt])
    assert values["interaction"] > 0
    gradients = DecoderGradients(t.clt, chunk_bytes=11 * t.clt.transcoder(0).W_dec[0].numel() * 4)
    t.loss(activations, 5, gradients)[0].backward()
    for index, gradient in enumerate(expected):
        for _ in range(2):  # once for the norm, once for the update
            chunks = list(gradients.chunks(index))
            torch.testing.assert_close(torch.cat([c.gradient for c in chunks]), gradient, rtol=1e-10, atol=1e-13)
            assert (torch.cat([c.touched for c in chunks]) | gradient.flatten(1).eq(0).all(1)).all()


def test_a_step_updates_decoders_once_and_leaves_no_gradient(tmp_path):
    t = penalised(tmp_path)
    activations = warmed_up(t)
    seen = []
    update = t.optimizer.update
    t.optimizer.update = lambda name, gradient, *rest, **more: (
        seen.append((name, len(gradient))) or update(name, gradient, *rest, **more)
    )
    t.train_step(activations)
    rows = {f"transcoders.{i}.W_dec": 0 for i in range(3)}
    for name, n in seen:
        if name in rows:
            rows[name] += n
    assert set(rows.values()) == {37} and all(p.grad is None for p in t.clt.parameters())


def test_micro_batches_have_its_gradient(tmp_path):
    t = penalised(tmp_path)
    activations = warmed_up(t)
    whole = gradients_of(t, activations, 3)
    assert whole["loss term interaction"] > 0
    t.clt.zero_grad()
    for name, gradient in gradients_of(t, activations, 2).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_training_with_it_makes_the_jacobian_smaller(tmp_path):
    found = []
    for weight in (0.0, 5.0):
        t = trainer(tmp_path, policy="none")
        t.objective.config = replace(t.config, loss=replace(t.config.loss, interaction_weight=weight))
        activations = t.batches.capture(next(t.batches.stream_at(0)))
        for _ in range(10):
            metrics = t.train_step(activations)
        latents = t.clt(activations, "vanilla").latents
        found.append(float(sum(jacobian_sums(t.clt, latents, activations)).detach()))
        assert ("interaction" in metrics) == (weight > 0)
    assert found[1] < 0.7 * found[0]
