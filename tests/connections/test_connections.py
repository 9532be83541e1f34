"""Which connections the policies choose, and when."""

import pytest
import torch
from clts import language_model, random_clt, tokens

from sparseclt.connections import selection
from sparseclt.connections.activity import RARE, Activity, RecentLatents
from sparseclt.connections.attended import KEYS, Attended
from sparseclt.connections.policies import FREE, LearnedConnections, TopConnections
from sparseclt.connections.selection import select_top_connections
from sparseclt.model.attention import head_rows
from sparseclt.model.modules import Latents
from sparseclt.model.sites import Site


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


def active(clt, model) -> Activity:
    M, a = len(clt.sites), clt.architecture
    activity = Activity(M, a.latents, recent=RecentLatents(clt.sites, a.active, tokens().numel()))
    activations = model.capture(tokens(), attention=True)
    activity.observe(clt(activations, "vanilla").latents, activations)
    return activity


def attended_latents(activations, z, layer):
    """What attention of `layer` reads of latents z [B, S, U], from its strongest keys that count: [B, S, U]."""
    mix = activations.mix(layer).mean(1)
    mix = mix * (mix >= mix.topk(KEYS, dim=-1).values[..., -1:]) * activations.counted[:, None, :]
    return mix @ z, mix.sum(-1)


def virtual_strength(clt, index):
    """|V|, dense: root of the sum over heads of squares for attention."""
    module = clt.transcoder(index)
    upstream = [clt.transcoder(u) for u in range(clt.upstream[index])]
    E = torch.cat(
        [u.W_dec[:, 0] if u.site.kind == "attn" else u.W_dec[:, : module.site.layer - u.site.layer].sum(1)
         for u in upstream]
    )  # fmt: skip
    rows, weights = clt.reading_rows(index), clt.attention_of(module.site)
    heads = [rows] if weights is None else [head_rows(rows, weights, h) for h in range(len(weights.W_V))]
    return torch.stack([r @ E.T for r in heads]).square().sum(0).sqrt()


@pytest.mark.parametrize("statistic", ["mean", "rms", "coactivation"])
@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_top_connections_are_those_of_largest_importance(model, attention, statistic):
    clt = random_clt(model, attention)
    activity = active(clt, model)
    chosen = select_top_connections(clt, activity, 4, statistic)
    activations = model.capture(tokens(), attention=True)
    z = clt(activations, "vanilla").latents
    z = torch.stack([latents.dense(clt.architecture.latents) for latents in z])  # [M, N, F]
    counted = activations.counted.flatten()
    assert chosen[0] is None
    for index in range(1, len(clt.sites)):
        before = z[: clt.upstream[index]].transpose(0, 1).flatten(1)  # [N, U]
        average = before[counted].mean(0)
        s = before[counted].square().mean(0).sqrt() if statistic == "rms" else average
        if statistic == "coactivation":
            on, taken = (z[index] > 0).double(), counted
            if clt.sites[index].kind == "attn":
                rows = before.view(*activations.tokens.shape, -1)
                before, weight = (x.flatten(0, 1) for x in attended_latents(activations, rows, clt.sites[index].layer))
                newest = counted.nonzero().flatten().flip(0)[: counted.numel() // KEYS]
                taken = torch.zeros_like(counted).index_fill(0, newest, True)
                average = average * weight[taken].mean()
            on, before = on[taken], before[taken]
            assert (on.sum(0) < RARE).any() and (on.sum(0) >= RARE).any()
            s = torch.where(on.sum(0)[:, None] < RARE, average, on.T @ before / on.sum(0).clamp_min(1)[:, None])
        importance = virtual_strength(clt, index) * s
        got = importance.gather(1, chosen[index])
        torch.testing.assert_close(
            got.sort(descending=True).values, importance.topk(4).values, msg=clt.sites[index].name, rtol=1e-5, atol=0
        )


def test_attention_reads_latents_of_the_tokens_it_attends_to():
    sites, every = [Site("mlp", 0), Site("attn", 1)], torch.zeros(3, 1, dtype=torch.int64)
    recent = RecentLatents(sites, 1, 3 * KEYS)
    upstream = Latents(torch.tensor([[5.0], [7.0], [9.0]]), torch.tensor([[0], [1], [2]]))
    reader = Latents(torch.tensor([[0.0], [0.0], [1.0]]), every)  # fires at token 2 only
    back, weights = torch.tensor([[0, 0], [1, 0], [2, 0]]), torch.tensor([[1.0, 0], [1.0, 0], [0.75, 0.25]])
    recent.add([upstream, reader], None, [Attended(back, weights)])
    sums, fired = recent.sums_when_active(1, slice(0, 1), slice(0, 4), 4)
    assert sums.tolist() == [[0.75 * 5, 0, 0.25 * 9, 0]] and fired.tolist() == [1]
    for _ in range(KEYS - 1):  # the ring is full now, and token 2's own key is among its oldest
        recent.add(
            [Latents(torch.ones(3, 1), every), Latents(torch.zeros(3, 1), every)], None, [Attended(back, weights)]
        )
    recent.add([Latents(torch.ones(1, 1), every[:1]), Latents(torch.ones(1, 1), every[:1])], None, [
        Attended(torch.tensor([[3 * KEYS, 0]]), torch.tensor([[1.0, 0.5]]))
    ])  # fmt: skip
    sums, fired = recent.sums_when_active(1, slice(0, 1), slice(0, 4), 4)
    assert sums.tolist() == [[0.5, 0, 0, 0]] and fired.tolist() == [1], "a key that was overwritten is not read"


def test_coactivation_is_selected_in_tiles(model, monkeypatch):
    clt = random_clt(model)
    whole = select_top_connections(clt, active(clt, model), 4)
    monkeypatch.setattr(selection, "SELECTION_BYTES", 3 * 40 * 8)
    tiled = select_top_connections(clt, active(clt, model), 4)
    assert all(torch.equal(a, b) for a, b in zip(whole[1:], tiled[1:], strict=True))


def test_a_latent_that_never_fires_is_not_chosen_before_one_that_does(model):
    clt = random_clt(model)
    activity = active(clt, model)
    silent = activity.magnitude("rms")[0] == 0
    assert silent.any() and (~silent).sum() >= 4
    assert not silent[select_top_connections(clt, activity, 4, "rms")[1]].any()


def test_recent_latents_are_a_ring():
    recent = RecentLatents([Site("mlp", 0), Site("mlp", 1)], 1, 3)
    for n in range(1, 6):  # token n: latent n % 2 of module 0 fires at n, latent 0 of module 1 always
        recent.add(
            [
                Latents(torch.tensor([[float(n)]]), torch.tensor([[n % 2]])),
                Latents(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64)),
            ]
        )
    sums, fired = recent.sums_when_active(1, slice(0, 2), slice(0, 2), 2)
    assert sums.tolist() == [[4.0, 8.0], [0.0, 0.0]] and fired.tolist() == [3, 0], "tokens 3, 4, 5 are left"
    recent.add([Latents(torch.arange(8.0)[:, None], torch.zeros(8, 1, dtype=torch.int64))] * 2)
    assert sorted(recent.values[0].flatten().tolist()) == [5.0, 6.0, 7.0], "more tokens than the ring holds"


def test_c_falls_geometrically_and_stays():
    policy = TopConnections(8, start=32, anneal_steps=100)
    assert [policy.at(s) for s in (0, 50, 100, 1000)] == [32, 16, 8, 8]


def test_connections_are_refreshed_on_schedule_and_then_frozen(model):
    clt, policy = random_clt(model), TopConnections(4, refresh_every=10, freeze_at=30)
    activity = Activity(3, 20)
    assert not policy.update(clt, activity, 0), "nothing is known of the latents yet"
    activity = active(clt, model)
    steps = [step for step in range(1, 60) if policy.update(clt, activity, step)]
    assert steps == [1, 10, 20, 30]


def test_fewer_upstream_latents_than_c_keeps_all_of_them(model):
    clt = random_clt(model)
    TopConnections(30).update(clt, active(clt, model), 1)
    assert [m.connections and m.connections.C for m in clt] == [None, 20, 30]


def test_learned_connections_open_and_close_by_the_sign_of_their_logit(model):
    clt = random_clt(model)
    policy = LearnedConnections(6, start_step=2)
    policy.prepare(clt)
    activity = active(clt, model)
    assert (
        not policy.update(clt, activity, 1) and policy.update(clt, activity, 2) and not policy.update(clt, activity, 3)
    )
    module = clt.transcoder(2)
    with torch.no_grad():
        module.logits[:, :2] = -0.5
    V = clt.virtual_weights()[2]
    assert not V[:, :2].any() and V[:, 2:].all()
    assert module.open_connections().sum(1).tolist() == [4] * 20


def test_learned_connections_get_the_sigmoids_gradient_open_or_closed(model):
    clt = random_clt(model)
    policy = LearnedConnections(6, start_step=0, pressure=0.25)
    policy.prepare(clt)
    policy.update(clt, active(clt, model), 0)
    module = clt.transcoder(1)
    with torch.no_grad():
        module.logits[:, 0] = -0.5
        raw = clt.virtual_weights()[1] / module.mask()
    clt.virtual_weights()[1].sum().backward()
    p = torch.sigmoid(module.logits.detach())
    torch.testing.assert_close(module.logits.grad[:, 1:], (raw * p * (1 - p))[:, 1:].float())
    assert module.logits.grad[:, 0].all()
    charged = [torch.sigmoid(clt.transcoder(m).logits).sort().values[:, :-FREE].sum(1).mean() for m in (1, 2)]
    torch.testing.assert_close(policy.pressure(clt), 0.25 * (charged[0] + charged[1]) / 2)


def test_the_strongest_connections_of_a_latent_are_free_except_in_the_dense_mask(model):
    for candidates, free in ((6, FREE), (None, 0)):
        clt = random_clt(model)
        policy = LearnedConnections(candidates)
        policy.prepare(clt)
        policy.update(clt, active(clt, model), 0)
        logits = clt.transcoder(1).logits
        policy.pressure(clt).backward()
        without = logits.grad == 0
        assert without.sum(1).tolist() == [free] * len(logits)
        assert without.gather(1, logits.topk(free).indices).all()


def test_the_dense_mask_has_a_logit_for_every_pair_near_a_tenth(model):
    clt = random_clt(model)
    policy = LearnedConnections(None)
    policy.prepare(clt)
    policy.update(clt, active(clt, model), 0)
    module = clt.transcoder(2)
    assert module.logits.shape == (20, 40) and module.logits.dtype == torch.float32
    assert (module.logits - 0.1).abs().max() < 0.01
    assert all(sorted(row) == list(range(40)) for row in module.connections.indices.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_latent": 8, "start": 4}, "connections.start_per_latent: expected at least per_latent = 8, got 4"),
        ({"per_latent": 8, "refresh_every": 0}, "connections.refresh_steps: expected at least 1, got 0"),
    ],
)
def test_impossible_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        TopConnections(**arguments)


def test_activity_counts_tokens_since_a_latent_fired_and_averages_what_it_fired():
    activity = Activity(1, 4, horizon=8)
    activity.update([Latents(torch.tensor([[2.0, 0.0], [4.0, 1.0]]), torch.tensor([[0, 1], [0, 2]]))])
    assert activity.tokens_since_fired.tolist() == [[0, 2, 0, 2]], "a slot of value 0 does not fire"
    torch.testing.assert_close(activity.magnitude("mean"), torch.tensor([[3.0, 0, 0.5, 0]]))
    torch.testing.assert_close(activity.magnitude("rms"), torch.tensor([[10.0, 0, 0.5, 0]]).sqrt())
    activity.update([Latents(torch.zeros(2, 1), torch.tensor([[0], [0]]))])
    assert activity.tokens_since_fired.tolist() == [[2, 4, 2, 4]]
    assert activity.dead(4).tolist() == [[False, True, False, True]]
    half = 0.5 ** (2 / 8)
    torch.testing.assert_close(activity.magnitude("mean")[0, 0].item(), 3 * half * (1 - half) / (1 - half**2))
