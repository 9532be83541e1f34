"""Interventions do to the logits what changing the reconstruction by hand does; the graph predicts the linear part."""

import pytest
import torch
from clts import random_clt
from graphs import PROMPT, TOKENS, clt_of, model_of, run_of

from sparseclt.graph.intervention import Intervention, _IntervenedPass, _predicted, _resolve, intervene
from sparseclt.graph.run import linear_logits, sparse_model_run
from sparseclt.model.forward import ForwardPass
from sparseclt.model.replacement import hooks

LAST = TOKENS.shape[1] - 1


def latents_at_last_token(family, attention, mode, module):
    clt = clt_of(family, attention)
    forward = ForwardPass(clt, mode)
    model_of(family).replaced_logits(TOKENS, **hooks(forward))
    return forward.latents[module].dense(clt.architecture.latents)[LAST]


@pytest.mark.parametrize(("value", "active"), [(0.0, True), (2.5, True), (1.5, False), (-1.0, False)])
@pytest.mark.parametrize("mode", ["vanilla", "sparse"])
@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_a_latent_of_the_last_module_moves_the_logits_by_its_decoder(attention, mode, value, active):
    model, clt = model_of("gpt2"), clt_of("gpt2", attention)
    z = latents_at_last_token("gpt2", attention, mode, -1)
    latent = int(z.argmax() if active else z.argmin())
    assert (z[latent] > 0) == active
    forward = ForwardPass(clt, mode)
    by_hand = hooks(forward)

    def moved(layer, live, plain=by_hand["on_mlp"]):
        output = plain(layer, live).clone()
        if layer == 2:
            output[0, LAST] += (value - z[latent]) * clt.transcoder(len(clt.sites) - 1).W_dec[latent, 0]
        return output

    with torch.no_grad():
        expected = model.replaced_logits(TOKENS, **{**by_hand, "on_mlp": moved})[0, -1]
    effects = intervene(clt, model, PROMPT, [Intervention("mlp_2", latent, (-1,), value=value)], modes=[mode])
    torch.testing.assert_close(
        effects.after[mode].logits, (expected - expected.mean())[effects.tokens], rtol=0, atol=1e-9
    )
    torch.testing.assert_close(effects.after[mode].probabilities, expected.softmax(-1)[effects.tokens])


@pytest.mark.parametrize("attention", ["frozen", "latents"])
@pytest.mark.parametrize("family", ["gpt2", "pythia"])
def test_the_prediction_is_the_derivative_while_attention_and_scales_stay(family, attention):
    clt, run = clt_of(family, attention), run_of(family, attention, False)
    z = run.forward.latents[0].dense(clt.architecture.latents)
    wanted = [Intervention(clt.sites[0].name, int(z[p].argmax()), (p,), factor=1 + 1e-7) for p in (2, LAST)]
    changes = _resolve(clt, len(run.tokens), wanted)
    tokens = torch.arange(8)
    predicted = _predicted(run, changes, tokens)
    directions, _ = linear_logits(run, tokens)

    def stream(forward):
        with torch.no_grad():
            for site in clt.sites:
                forward.advance(site, run.forward.activations)
        return sum(forward.output(site)[LAST] for site in clt.sites)

    moved = stream(_IntervenedPass(clt, "sparse", changes)) - stream(ForwardPass(clt, "sparse"))
    assert predicted.abs().max() > 1e-9
    torch.testing.assert_close(predicted, directions @ moved, rtol=1e-4, atol=1e-13)


def test_a_factor_of_one_changes_nothing_and_a_factor_acts_on_the_value_of_its_mode():
    clt, model = clt_of("llama", "frozen"), model_of("llama")
    latent = int(run_of("llama", "frozen", False).forward.latents[1].indices[LAST, 0])
    same = intervene(clt, model, PROMPT, [Intervention("mlp_1", latent, factor=1.0)])
    for mode in ("vanilla", "sparse"):
        torch.testing.assert_close(same.after[mode].logits, same.before[mode].logits, rtol=0, atol=1e-12)
        value = latents_at_last_token("llama", "frozen", mode, 1)[latent].item()
        by_factor = intervene(clt, model, PROMPT, [Intervention("mlp_1", latent, (-1,), factor=3.0)], modes=[mode])
        by_value = intervene(clt, model, PROMPT, [Intervention("mlp_1", latent, (-1,), value=3 * value)], modes=[mode])
        outcomes = [
            dict(zip(e.tokens.tolist(), e.after[mode].logits.tolist(), strict=True)) for e in (by_factor, by_value)
        ]
        shared = outcomes[0].keys() & outcomes[1].keys()  # the likeliest ones of sparse mode, where the values differ
        assert shared and [outcomes[0][t] for t in shared] == pytest.approx([outcomes[1][t] for t in shared], abs=1e-12)
    assert same.predicted.abs().max() < 1e-12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mlp_2/137@5=0", Intervention("mlp_2", 137, (5,), value=0.0)),
        ("attn_0/3@-1=x2.5", Intervention("attn_0", 3, (-1,), factor=2.5)),
        ("mlp_2/137@2-4=-1e-2", Intervention("mlp_2", 137, (2, 3, 4), value=-0.01)),
        ("mlp_2/137@*=x0", Intervention("mlp_2", 137, None, factor=0.0)),
    ],
)
def test_what_the_command_takes(text, expected):
    assert Intervention.parse(text) == expected


OTHER_FORMS = ["mlp_2", "mlp_2/137", "mlp_2/137@5", "mlp_2/x@5=0", "mlp_2/1@=0", "mlp_2/1@4-2=0", "mlp_2/1@5=nan"]


@pytest.mark.parametrize("text", OTHER_FORMS)
def test_other_forms_are_refused(text):
    with pytest.raises(ValueError, match="latents: expected"):
        Intervention.parse(text)


@pytest.mark.parametrize(
    ("interventions", "message"),
    [
        ([], "expected at least one intervention"),
        (["mlp_9/1@1=0"], r"expected a site of this CLT \(mlp_0, mlp_1, mlp_2\), got 'mlp_9'"),
        (["attn_0/1@1=0"], "expected a site of this CLT"),
        (["mlp_1/20@1=0"], "expected a latent from 0 to 19, got mlp_1/20"),
        (["mlp_1/2@7=0"], r"expected a position from 1 to 6 \(position 0 has no latents\), got 7"),
        (["mlp_1/2@0=0"], "expected a position from 1 to 6"),
        (["mlp_1/2@-7=0"], "expected a position from 1 to 6"),
        (["mlp_1/2@6=0", "mlp_1/2@-1=1"], "expected one intervention on mlp_1/2@6, got two"),
    ],
)
def test_what_does_not_exist_is_named(interventions, message):
    parsed = [Intervention.parse(text) for text in interventions]
    with pytest.raises(ValueError, match=f"latents: {message}"):
        intervene(clt_of("gpt2", "frozen"), model_of("gpt2"), PROMPT, parsed)


def test_a_clt_without_connections_is_changed_in_vanilla_mode():
    clt, model = random_clt(model_of("gpt2")), model_of("gpt2")
    run = sparse_model_run(clt, model, TOKENS, ForwardPass(clt, "vanilla"))
    z = run.forward.latents[2].dense(clt.architecture.latents)[LAST]
    latent = int(z.argmax())
    effects = intervene(clt, model, PROMPT, [Intervention("mlp_2", latent, (-1,), value=0.0)])
    assert list(effects.before) == list(effects.after) == ["vanilla"]
    directions, _ = linear_logits(run, effects.tokens)
    expected = -z[latent] * (directions @ clt.transcoder(2).W_dec[latent, 0])
    torch.testing.assert_close(effects.predicted, expected.detach())
    with pytest.raises(ValueError, match="clt: expected a CLT with connections"):
        intervene(clt, model, PROMPT, [Intervention("mlp_1", 0, value=0.0)], modes=["sparse"])
