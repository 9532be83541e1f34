"""Measured figures against plain formulas, and the replaced model."""

import pytest
import torch
from clts import connect_random, language_model, open_all, random_clt, tokens

from sparseclt.evaluation.metrics import evaluate
from sparseclt.evaluation.pruning import fvu_against_c
from sparseclt.evaluation.structure import nearest_decoders
from sparseclt.model.replacement import replacement
from sparseclt.training.losses import fvu

ROWS = tokens(rows=6, length=12)


@pytest.fixture(scope="module", params=["gpt2", "pythia"])
def model(request):
    return language_model(request.param)


@pytest.fixture
def clt(model):
    clt = random_clt(model)
    connect_random(clt, 6)
    return clt


def test_figures_do_not_depend_on_the_batches_and_equal_the_formulas(clt, model):
    result = evaluate(clt, model, ROWS, batch_rows=4).to_dict()
    again = evaluate(clt, model, ROWS, batch_rows=1).to_dict()
    activations = model.capture(ROWS)
    counted = activations.counted_flat
    real = {site: y[counted] for site, y in activations.outputs(clt.sites).items()}
    for mode in ("vanilla", "sparse"):
        forward = clt(activations, mode)
        for m, site in enumerate(clt.sites):
            row, other = result["modules"][m], again["modules"][m]
            values, indices = forward.latents[m]
            fired = indices[values > 0].unique()
            assert row[f"fvu_{mode}"] == pytest.approx(fvu(real[site], forward.output(site)[counted]).item())
            assert row[f"fvu_{mode}"] == pytest.approx(other[f"fvu_{mode}"])
            assert row[f"l0_{mode}"] == pytest.approx((values > 0).sum().item() / counted.sum().item())
            assert row[f"dead_{mode}"] == pytest.approx(1 - len(fired) / 20)
    assert result["tokens"] == 6 * 11, "position 0 of a row does not count"
    for name, value in result["cross_entropy"].items():
        assert value == pytest.approx(again["cross_entropy"][name])


def test_the_mean_excess_leaves_the_first_module_out(clt, model):
    result = evaluate(clt, model, ROWS, cross_entropy=False).to_dict()
    rows = result["modules"]
    if model.shape.parallel:
        assert rows[1]["upstream"] == 20
    assert rows[0]["excess_fvu"] == pytest.approx(0, abs=1e-10)
    assert result["mean"]["excess_fvu"] == pytest.approx((rows[1]["excess_fvu"] + rows[2]["excess_fvu"]) / 2)
    assert result["mean"]["fvu_sparse"] == pytest.approx(sum(r["fvu_sparse"] for r in rows) / 3)


def test_connections_in_effect_counts_strong_open_connections_of_live_latents(clt, model):
    with torch.no_grad():
        clt.transcoder(0).W_dec.zero_()  # everything that module 1 reads is now worth nothing
    rows = evaluate(clt, model, ROWS, cross_entropy=False).to_dict()["modules"]
    assert rows[1]["connections_in_effect"] == 0
    assert 0 < rows[2]["connections_in_effect"] <= 6
    assert rows[0]["connections_in_effect"] is None


def test_the_mean_number_of_connections_is_that_of_live_latents(clt, model):
    connect_random(clt, 6, empty=0.4, seed=1)
    activations = model.capture(ROWS)
    values, ids = clt(activations, "sparse").latents[2]
    live = ids[activations.counted_flat[:, None] & (values > 0)].unique()
    counts = (clt.transcoder(2).connections.indices[live] >= 0).sum(1).double()
    row = evaluate(clt, model, ROWS, cross_entropy=False).to_dict()["modules"][2]
    assert row["connections_mean"] == pytest.approx(counts.mean().item())
    assert row["connections_in_effect"] == counts.median().item() != row["connections_mean"]


@pytest.mark.parametrize("mode", ["vanilla", "sparse"])
@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_the_replaced_model_reads_itself_and_nothing_of_the_real_run(model, attention, mode):
    """The replaced run by hand: the model's own blocks, with every replaced output taken from the CLT's formulas."""
    clt = random_clt(model, attention)
    connect_random(clt, 6)
    logits = model.replaced_logits(ROWS, **replacement(clt, mode))
    seen = {}

    hooks = replacement(clt, mode)
    recording = {
        name: (lambda layer, live, name=name, hook=hook: seen.setdefault((name, layer), hook(layer, live)))
        for name, hook in hooks.items()
    }
    assert torch.equal(model.replaced_logits(ROWS, **recording), logits)
    # A second run that simply plays the recorded outputs back reads the same stream, so captures the same inputs.
    captured = {}

    def play(name):
        def hook(layer, live):
            captured["live"] = live
            return seen[(name, layer)]

        return hook

    model.replaced_logits(ROWS, **{name: play(name) for name in hooks})
    live = captured["live"]
    forward = clt(live, mode) if attention == "frozen" else None
    if forward is not None:
        for site in clt.sites:
            torch.testing.assert_close(forward.output(site).view_as(live.r_0), seen[("on_mlp", site.layer)])


def test_a_perfect_replacement_costs_nothing(model):
    own = model.cross_entropy(ROWS)
    kept = model.cross_entropy(ROWS, on_mlp=lambda layer, live: live.mlp_out[-1])
    torch.testing.assert_close(own, kept)


def test_nearest_decoders_are_found_across_tiles():
    torch.manual_seed(0)
    decoders = torch.randn(10, 4)
    decoders[7] = decoders[1] * 2 + 0.1
    unit = decoders / decoders.norm(dim=1, keepdim=True)
    expected = (unit @ unit.T - 2 * torch.eye(10)).max(1)
    cosine, index = nearest_decoders(decoders, tile=3)
    torch.testing.assert_close(cosine, expected.values)
    assert torch.equal(index, expected.indices) and index[7] == 1 and index[1] == 7


def test_more_of_the_same_connections_bring_the_modes_together(model):
    """FVU against C ends at the value with everything open, and the CLT's own connections are put back."""
    clt = random_clt(model)
    connect_random(clt, 6)
    own = [m.connections for m in clt]
    rows = fvu_against_c(clt, model, ROWS, [1, 40])
    assert [m.connections for m in clt] == own
    open_all(clt)
    mean = evaluate(clt, model, ROWS[1::2], cross_entropy=False).to_dict()["mean"]  # chosen on the other rows
    assert [row["C"] for row in rows] == [1, 40]
    assert rows[1]["fvu_sparse"] == pytest.approx(mean["fvu_sparse"])


def test_without_connections_only_vanilla_mode_is_measured(model):
    result = evaluate(random_clt(model), model, ROWS).to_dict()
    assert result["mean"]["fvu_sparse"] is None and result["cross_entropy"]["sparse"] is None
