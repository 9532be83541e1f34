"""The excess splits into propagated error and cost of sparsity; figures of latents against plain formulas."""

from itertools import pairwise

import pytest
import torch
from clts import F, connect_random, language_model, open_all, random_clt, tokens

from sparseclt.evaluation.metrics import evaluate
from sparseclt.evaluation.statistics import DENSITY_EDGES

ROWS = tokens(rows=4, length=12)


@pytest.fixture(scope="module", params=["gpt2", "pythia"])
def model(request):
    return language_model(request.param)


def measured(clt, model):
    return evaluate(clt, model, ROWS, cross_entropy=False)


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_all_open_is_the_fvu_with_every_connection_and_disconnected_that_with_none(model, attention):
    clt = random_clt(model, attention)
    connect_random(clt, 6)
    sparse = measured(clt, model)
    open_all(clt)
    all_open = measured(clt, model)
    for module in clt:
        if module.upstream:
            module.connect(torch.full((F, 1), -1))
    closed = measured(clt, model)
    for row, whole, none in zip(sparse.modules, all_open.modules, closed.modules, strict=True):
        assert row.fvu_all_open == pytest.approx(whole.fvu_sparse), row.name
        assert row.fvu_disconnected == pytest.approx(none.fvu_sparse), row.name
        assert whole.cost_of_sparsity == pytest.approx(0, abs=1e-12)
        assert row.excess_fvu == pytest.approx(row.propagated_error + row.cost_of_sparsity)
    last = sparse.modules[-1]
    assert (
        len({round(x, 6) for x in (last.fvu_vanilla, last.fvu_sparse, last.fvu_all_open, last.fvu_disconnected)}) == 4
    )
    assert sparse.mean.excess_fvu == pytest.approx(sparse.mean.propagated_error + sparse.mean.cost_of_sparsity)


def test_with_error_nodes_all_open_is_vanilla_mode(model):
    clt, activations = random_clt(model, "latents"), model.capture(ROWS, attention=True)
    vanilla = clt(activations, "vanilla")
    open_pass = clt(activations, "sparse", error_nodes=True, open_connections="all")
    for site in clt.sites:
        torch.testing.assert_close(vanilla.output(site), open_pass.output(site), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="open_connections: expected 'own' in vanilla mode, got 'all'"):
        clt(activations, "vanilla", open_connections="all")


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_density_and_twins_equal_the_dense_formulas(activation):
    model = language_model("gpt2")
    clt = random_clt(model, activation=activation)
    with torch.no_grad():
        for module in clt:  # latents 3 and 4: the same decoder and nearly the same encoder
            module.W_dec[4] = module.W_dec[3]
            module.W_enc[4], module.b_enc[4] = module.W_enc[3] * 1.01, module.b_enc[3]
    connect_random(clt, 6)
    result = measured(clt, model)
    activations = model.capture(ROWS)
    for mode in ("vanilla", "sparse"):
        for row, z in zip(result.modules, clt(activations, mode).latents, strict=True):
            on = z.dense(F) > 0
            rates = on.double().sum(0) / result.tokens
            log = rates[rates > 0].log10()
            histogram = [int(((log >= low) & (log < high)).sum()) for low, high in pairwise(DENSITY_EDGES)]
            histogram[-1] += int((log == 0).sum())
            assert row.density[mode] == histogram and sum(histogram) == (rates > 0).sum()
    for row, module, z in zip(result.modules, clt, clt(activations, "vanilla").latents, strict=True):
        unit = torch.nn.functional.normalize(module.W_dec.flatten(1), dim=1)
        cosine, nearest = (unit @ unit.T - 2 * torch.eye(F)).max(1)
        on = (z.dense(F) > 0).double()
        both, either = (on * on[:, nearest]).sum(0), (on + on[:, nearest]).clamp_max(1).sum(0)
        assert row.cofiring_twins == pytest.approx((both > 0.5 * either).double().mean().item())
        assert row.splitting == pytest.approx((cosine > 0.9).double().mean().item()) and row.splitting >= 2 / F
        assert row.splitting_near == pytest.approx((cosine > 0.7).double().mean().item())
    assert result.mean.cofiring_twins > 0
