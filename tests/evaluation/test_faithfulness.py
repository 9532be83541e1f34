"""Ablations and agreement against plain formulas; connections that carry everything, and ones that carry nothing."""

import pytest
import torch
from clts import F, connect_random, language_model, open_all, random_clt, tokens

from sparseclt.evaluation.faithfulness import faithfulness
from sparseclt.graph.prompt_scores import prompt_scores
from sparseclt.model.replacement import replacement

ROWS = tokens(rows=4, length=12)


@pytest.fixture(scope="module", params=["gpt2", "pythia"])
def model(request):
    return language_model(request.param)


def test_what_is_connected_and_what_is_not_equal_the_dense_formula(model):
    clt = random_clt(model)
    connect_random(clt, 6)
    own = [module.connections for module in clt]
    result = faithfulness(clt, model, ROWS, batch_rows=3)
    assert [module.connections for module in clt] == own
    activations = model.capture(ROWS)
    forward = clt(activations, "sparse", open_connections="all")
    z = torch.cat([latents.dense(F) for latents in forward.latents], 1)
    assert [a.name for a in result.ablations] == ["mlp_1", "mlp_2"]
    for a in result.ablations:
        m = int(a.name[-1])
        module = clt.transcoder(m)
        E = torch.cat([clt.transcoder(u).W_dec[:, : m - u].sum(1) for u in range(clt.upstream[m])])
        V = clt.reading_rows(m) @ E.T
        mask = torch.zeros(F, module.upstream + 1, dtype=V.dtype)
        ids = module.connection_indices
        mask = mask.scatter(1, ids.masked_fill(ids < 0, module.upstream), 1.0)[:, :-1]
        scale, on = activations.scale[m].flatten()[:, None], forward.latents[m].dense(F) > 0
        before = z[:, : module.upstream]
        total, part = ((before @ weights.T / scale)[on] for weights in (V, V * mask))
        assert a.connected == pytest.approx(part.square().mean().sqrt().item())
        assert a.unconnected == pytest.approx((total - part).square().mean().sqrt().item())
        assert a.carried == pytest.approx(1 - ((total - part).square().sum() / total.square().sum()).item())
        assert a.random != a.connected


def test_kl_and_top_token_equal_the_formula_and_do_not_depend_on_batches(model):
    clt = random_clt(model)
    connect_random(clt, 6)
    a, b = (faithfulness(clt, model, ROWS, batch_rows=n).agreement for n in (1, 4))
    real = model.replaced_logits(ROWS)[:, 1:-1].log_softmax(-1)
    for mode in ("vanilla", "sparse"):
        replaced = model.replaced_logits(ROWS, **replacement(clt, mode))[:, 1:-1].log_softmax(-1)
        assert a[mode].kl == pytest.approx((real.exp() * (real - replaced)).sum(-1).mean().item())
        assert a[mode].top1 == pytest.approx((real.argmax(-1) == replaced.argmax(-1)).double().mean().item())
        assert a[mode].kl == pytest.approx(b[mode].kl)
    assert a["shuffled"].kl != a["sparse"].kl


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_all_connections_carry_everything_and_empty_slots_nothing(model, attention):
    clt = random_clt(model, attention)
    open_all(clt)
    whole = faithfulness(clt, model, ROWS)
    assert whole.fvu_shuffled == pytest.approx(whole.fvu_sparse), "all connections in another order"
    assert all(a.unconnected < 1e-9 * a.connected and a.carried == pytest.approx(1) for a in whole.ablations)
    for module in clt:
        if module.upstream:
            module.connect(torch.full((F, 2), -1))
    nothing = faithfulness(clt, model, ROWS)
    assert nothing.ablations and all(a.connected == 0 == a.carried and a.unconnected > 0 for a in nothing.ablations)
    with pytest.raises(ValueError, match="clt: expected a CLT with connections"):
        faithfulness(random_clt(model), model, ROWS)


def test_scores_are_means_over_prompts():
    model = language_model("gpt2")
    clt = random_clt(model)
    connect_random(clt, 6)
    both = prompt_scores(clt, model, ROWS, prompts=2, prompt_tokens=6)
    single = [prompt_scores(clt, model, row, prompts=1, prompt_tokens=6) for row in ROWS[:2].split(1)]
    assert (both.prompts, both.prompt_tokens) == (2, 6)
    assert both.replacement == pytest.approx(sum(s.replacement for s in single) / 2)
    assert both.completeness == pytest.approx(sum(s.completeness for s in single) / 2)
    assert both.replacement_std == pytest.approx(abs(single[0].replacement - single[1].replacement) / 2)
