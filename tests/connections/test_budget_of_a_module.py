"""Connections that a module's latents share: as many in all, more for those that would miss them most."""

import pytest
import torch
from clts import language_model, random_clt
from test_connections import active, virtual_strength

from sparseclt.config import ConnectionConfig
from sparseclt.config.strict import ConfigError
from sparseclt.connections.policies import make_policy
from sparseclt.connections.selection import LEAST, MOST, select_top_connections, shared_out

C = 4


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


def test_the_most_costly_ones_are_kept_and_two_of_every_latent():
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(20, MOST * C, generator=generator).sort(descending=True).values
    costs[3] = 0  # never fires
    ids = torch.rand(20, 60, generator=generator).argsort()[:, : MOST * C]
    chosen = shared_out(ids, costs, C)
    counts = (chosen >= 0).sum(1)
    assert counts.sum() == 20 * C and counts[3] == LEAST and counts.max() == chosen.shape[1] > C
    kept = [costs[i, : counts[i]] for i in range(20)]
    assert all(torch.equal(chosen[i, : counts[i]], ids[i, : counts[i]]) for i in range(20))
    weakest = min(float(row[LEAST:].min()) for row in kept if len(row) > LEAST)
    assert weakest >= max(float(costs[i, counts[i] :].max()) for i in range(20) if counts[i] < costs.shape[1])


def test_one_connection_per_latent_is_one_for_each():
    ids = torch.arange(12).view(3, 4)
    assert shared_out(ids, torch.rand(3, 4), 1).tolist() == [[0], [4], [8]]


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_the_cost_is_the_squared_error_of_what_latents_write(model, attention):
    clt = random_clt(model, attention)
    activity = active(clt, model)
    most = select_top_connections(clt, activity, MOST * C)
    shared = select_top_connections(clt, activity, C, budget="module")
    assert shared[0] is None
    for index in range(1, len(clt.sites)):
        ids, module = most[index], clt.transcoder(index)
        F, U = module.latents, module.upstream
        s = activity.coactivation(index, slice(0, F), clt.upstream[index])
        strength = (virtual_strength(clt, index) * s).gather(1, ids)
        fired = torch.stack(
            [(activity.recent.values[index] > 0)[activity.recent.indices[index] == i].sum() for i in range(F)]
        )
        norms = module.W_dec.square().sum(2)
        costs = strength.square() * (fired.sqrt() * (norms / norms.mean(0)).sum(1))[:, None]
        expected = shared_out(ids, costs, min(C, U))
        assert (shared[index] >= 0).sum() == F * min(C, U)
        assert all(set(a.tolist()) == set(b.tolist()) for a, b in zip(shared[index], expected, strict=True))
        assert len({int((row >= 0).sum()) for row in shared[index]}) > 1


def test_the_policy_connects_them(model):
    clt = random_clt(model)
    config = ConnectionConfig(per_latent=C, budget="module")
    make_policy(config, clt, 10, None).update(clt, active(clt, model), 0)
    expected = select_top_connections(clt, active(clt, model), C, budget="module")
    assert all(torch.equal(m.connection_indices, ids) for m, ids in zip(clt, expected, strict=True) if m.upstream)
    assert clt.virtual_weights()[1].shape == expected[1].shape


def test_only_the_top_policy_by_coactivation_has_one():
    for other in ({"policy": "learned"}, {"importance": "rms"}):
        with pytest.raises(
            ConfigError, match="connections.budget: expected 'latent' unless connections.policy is 'top'"
        ):
            ConnectionConfig(budget="module", **other)
