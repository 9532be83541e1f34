"""KL against connections kept: against runs with the same connections, and areas that can be worked out by hand."""

import pytest
import torch
from clts import F, connect_random, language_model, open_all, random_clt, tokens
from torch import nn

from sparseclt.connections.selection import select_top_connections
from sparseclt.evaluation import interaction
from sparseclt.evaluation.interaction import area, interaction_sparsity, own_connections_ranked, relative_area
from sparseclt.evaluation.reconnected import activity_on
from sparseclt.model.forward import ForwardPass
from sparseclt.model.replacement import hooks, replacement

ROWS = tokens(rows=4, length=12)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


def kl_of(model, clt, mode="sparse") -> float:
    """That of the rows that curves are measured on, by the plain formula."""
    rows = ROWS[1::2]
    real = model.replaced_logits(rows)[:, 1:-1].log_softmax(-1)
    replaced = model.replaced_logits(rows, **replacement(clt, mode))[:, 1:-1].log_softmax(-1)
    return (real.exp() * (real - replaced)).sum(-1).mean().item()


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_every_point_is_a_run_with_the_most_important_pairs_only(model, attention):
    clt = random_clt(model, attention)
    found = interaction_sparsity(clt, model, ROWS, batch_rows=1)
    assert not clt.connected and found.edges == "all" and found.tokens == 2 * 11
    curve = {point.kept: point for point in found.curve}
    assert list(curve) == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert found.kl_vanilla == pytest.approx(kl_of(model, clt, "vanilla"))
    activity = activity_on(clt, model, ROWS[::2], 4, None, "coactivation")
    for kept in (1, 8):
        other = random_clt(model, attention)
        other.connect(select_top_connections(other, activity, kept))
        assert curve[kept].kl == pytest.approx(kl_of(model, other))
        assert curve[kept].edges == sum(F * min(kept, m.upstream) for m in other)
    open_all(other)
    assert curve[256].kl == pytest.approx(kl_of(model, other)) and found.kl_all == pytest.approx(curve[256].kl)
    rows = ROWS[1::2]
    real = model.replaced_logits(rows)[:, 1:-1].log_softmax(-1)
    none = model.replaced_logits(rows, **hooks(ForwardPass(clt, "sparse", open_connections="none")))
    assert curve[0].edges == 0
    assert curve[0].kl == pytest.approx((real.exp() * (real - none[:, 1:-1].log_softmax(-1))).sum(-1).mean().item())


def test_the_edges_of_a_connected_clt_are_its_connections(model):
    clt = random_clt(model)
    connect_random(clt, 6)
    own = [module.connection_indices.clone() for module in clt if module.upstream]
    found = interaction_sparsity(clt, model, ROWS)
    curve = {point.kept: point for point in found.curve}
    assert all(map(torch.equal, own, [m.connection_indices for m in clt if m.upstream]))
    assert found.edges == "own" and found.kl_all == curve[8].kl == curve[256].kl == pytest.approx(kl_of(model, clt))
    assert curve[256].edges == sum(int((ids >= 0).sum()) for ids in own)
    assert curve[1].edges == sum(int((ids >= 0).any(1).sum()) for ids in own)
    assert len({curve[kept].kl for kept in (0, 1, 2, 4, 8)}) == 5


def test_own_connections_are_ranked_by_virtual_weight_and_coactivation(model):
    clt = random_clt(model)
    connect_random(clt, 6)
    activity = activity_on(clt, model, ROWS, 4, None, "coactivation")
    for module in clt:
        if module.upstream:  # every other one closed
            module.logits = nn.Parameter(torch.tensor([1.0, -1.0]).repeat(F, 3))
    ranked = own_connections_ranked(clt, activity, "coactivation", None)
    V = clt.unmasked_virtual_weights()
    assert ranked[0] is None
    for m in (1, 2):
        ids, s = clt.transcoder(m).connection_indices, activity.coactivation(m, slice(0, F), clt.upstream[m])
        for i in range(F):
            opened = [c for c in (0, 2, 4) if ids[i, c] >= 0]
            best = sorted(opened, key=lambda c: -(V[m][i, c].abs() * s[i, ids[i, c]]).item())
            assert ranked[m][i].tolist() == [*ids[i, best].tolist(), *[-1] * (6 - len(best))]


def test_with_more_connections_than_the_curve_shows_all_of_them_are_the_floor(model, monkeypatch):
    clt = random_clt(model)
    open_all(clt)
    whole = interaction_sparsity(clt, model, ROWS)
    monkeypatch.setattr(interaction, "LADDER", (0, 1, 2))
    found = interaction_sparsity(clt, model, ROWS)
    assert found.kl_all == whole.kl_all == whole.curve[-1].kl and found.curve == whole.curve[:3]


def test_without_connections_the_curve_is_flat(model):
    clt = random_clt(model)
    for module in clt:
        if module.upstream:
            module.connect(torch.empty(F, 0, dtype=torch.int64))
    found = interaction_sparsity(clt, model, ROWS)
    assert found.relative_area is None and found.area == pytest.approx(found.kl_all)
    assert {point.kl for point in found.curve} == {found.kl_all}


def test_areas_worked_out_by_hand():
    assert area([(0, 3.0), (1, 3.0), (7, 3.0)]) == pytest.approx(3)
    assert area([(0, 4.0), (1, 2.0), (3, 0.0)]) == pytest.approx(2)  # places 0, 1, 2
    assert area([(0, 1.0), (1, 0.0), (255, 0.0)]) == pytest.approx(0.5 / 8)
    assert relative_area([(0, 5.0), (1, 3.0), (3, 1.0)], floor=1.0) == pytest.approx(0.5)
    assert relative_area([(0, 1.0), (1, 3.0)], floor=1.0) is None


def test_what_cannot_be_measured_is_refused(model):
    with pytest.raises(ValueError, match="rows: expected at least 2"):
        interaction_sparsity(random_clt(model), model, ROWS[:1])
