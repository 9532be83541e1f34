"""Candidates of learned connections, exchanged for better ones that are found without a matrix of all pairs."""

import copy

import pytest
import torch
from clts import language_model, random_clt, tokens
from op_helpers import LargestAllocation

from sparseclt.config import (
    CheckpointConfig,
    CLTConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    TrainConfig,
)
from sparseclt.connections import exchange, selection
from sparseclt.connections.activity import Activity
from sparseclt.connections.gradients import RecentGradients
from sparseclt.connections.policies import LearnedConnections
from sparseclt.model.shape import ModelShape
from sparseclt.training.memory_plan import make_plan
from sparseclt.training.trainer import Trainer

ROWS = tokens(rows=16, length=12)
ALL = slice(0, 20)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


def with_gates(model, attention: str, share: float = 0.3):
    """A CLT with a gate for each pair, a share of which are open."""
    clt = random_clt(model, attention)
    generator = torch.Generator().manual_seed(1)
    for module in clt:
        if module.upstream:
            module.connect(torch.arange(module.upstream).expand(module.latents, -1))
            is_open = torch.rand(module.latents, module.upstream, generator=generator) < share
            module.logits = torch.nn.Parameter(is_open.double() - 0.5)
    return clt


def backward(clt, activations):
    """The latents of a pass in sparsely-connected mode, and the gradients of its squared error with respect to them."""
    forward = clt(activations, "sparse")
    for z in forward.latents:
        z.values.retain_grad()
    sum((activations.output(site) - forward.output(site)).square().sum() for site in clt.sites).backward()
    return forward.latents, [z.values.grad for z in forward.latents]


def gate_gradients(module):
    """The gradient of the loss with respect to each gate, 0 or 1."""
    p = torch.sigmoid(module.logits.detach())
    return module.logits.grad / (p * (1 - p))


def gains(clt, recent, rows=ALL):
    """By reader: how much opening each connection lowers the loss, [rows, U]."""
    readers = exchange.effective_decoders(clt.readers(), clt.sites, [m.W_dec.detach() for m in clt])
    found = {}
    for reader, E in readers:
        encoders = reader.carried(clt.reading_rows(reader.index).detach())[..., rows, :]
        found[reader.index] = exchange._gain(clt, recent, reader, encoders, E, rows, slice(0, len(E)))
    return found


def test_recent_latents_tell_the_gradient_of_every_gate_open_or_closed(model):
    clt, activations = with_gates(model, "frozen"), model.capture(ROWS)
    recent = RecentGradients(clt.sites, clt.architecture.active, ROWS.numel(), heads=1)
    recent.add(*backward(clt, activations), activations)
    for index, found in gains(clt, recent, slice(3, 17)).items():
        expected = -gate_gradients(clt.transcoder(index))[3:17]
        assert expected.abs().max() > 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_keys_that_are_drawn_tell_the_gradient_of_an_attention_readers_gates_on_average(model):
    clt, activations = with_gates(model, "latents"), model.capture(ROWS, attention=True)
    draws, n = 60, activations.counted_tokens
    recent = RecentGradients(clt.sites, clt.architecture.active, draws * n, heads=model.shape.heads)
    latents, gradients = backward(clt, activations)
    for _ in range(draws):
        recent.add(latents, gradients, activations)
    for index, found in gains(clt, recent).items():
        expected = -gate_gradients(clt.transcoder(index))
        error = (found - expected).norm() / expected.norm()
        assert error < (0.15 if clt.sites[index].kind == "attn" else 1e-4), clt.sites[index].name


def test_what_the_ring_has_overwritten_is_not_read(model):
    clt, activations = with_gates(model, "latents"), model.capture(ROWS, attention=True)
    latents, gradients = backward(clt, activations)
    n = activations.counted_tokens
    capacity = n + 7
    recent = RecentGradients(clt.sites, clt.architecture.active, capacity, heads=model.shape.heads)
    for _ in range(3):
        recent.add(latents, gradients, activations)
    index = next(i for i, site in enumerate(clt.sites) if site.kind == "attn" and i)
    age = (int(recent.seen) - 1 - torch.arange(capacity)) % capacity
    stale = (age[recent.sources[index].long()] < age[:, None]) & (recent.weights[index] > 0)
    assert stale.any(), "a case in which it matters"
    found = recent.gradient(index, ALL, clt.upstream[index], 20)
    recent.weights[index][stale] = 0
    assert torch.equal(found, recent.gradient(index, ALL, clt.upstream[index], 20))


def as_candidates(clt, chosen):
    """The CLT of `with_gates` with some of its pairs as candidates: open ones are as open as there."""
    other = copy.deepcopy(clt)
    for module, ids in zip(other, chosen, strict=True):
        if ids is not None:
            module.logits = torch.nn.Parameter(module.logits.detach().gather(1, ids))
            module.connect(ids)
    return other


def test_closed_candidates_give_way_to_the_pairs_that_importance_missed(model):
    """Of 6 candidates by importance 3 are open; whichever closed pairs lower the loss the most take the others."""
    clt, activations = with_gates(model, "frozen", share=0), model.capture(ROWS)
    activity = Activity(len(clt.sites), 20)
    activity.update(clt(activations, "vanilla").latents)
    chosen = selection.select_top_connections(clt, activity, 6, "mean")
    for module, ids in zip(clt, chosen, strict=True):
        if ids is not None:
            module.logits.data.scatter_(1, ids[:, :3], 0.5)
    recent = RecentGradients(clt.sites, clt.architecture.active, ROWS.numel(), heads=1)
    recent.add(*backward(clt, activations), activations)
    few = as_candidates(clt, chosen)
    price = 0.5
    for tile in (1, 1 << 20):
        found = exchange.exchanged_candidates(few, recent, price, most=2, bytes_at_a_time=tile)
        for module, ids, got in zip(clt, chosen, found, strict=True):
            if ids is None:
                assert got is None
                continue
            gain = (-gate_gradients(module)).scatter(1, ids, -torch.inf)
            best = gain.topk(2, dim=1)
            assert (best.values > price).any() and (best.values < price).any(), "a case in which the price matters"
            for row in range(20):
                wanted = set(best.indices[row][best.values[row] > price].tolist())
                assert set(got.connections[row][got.new[row]].tolist()) == wanted
                kept = got.connections[row][~got.new[row]].tolist()
                assert set(kept) <= set(ids[row].tolist()) and set(ids[row, :3].tolist()) <= set(kept)


def learning(out, model, **connections) -> Trainer:
    config = TrainConfig(
        out=str(out), steps=8, batch_rows=2, clt=CLTConfig(latents=16, active=3, attention="latents"),
        connections=ConnectionConfig(
            "learned", 4, refresh_steps=2, candidates_after_steps=1, recent_tokens=50, **connections
        ),
        loss=LossConfig(sparse_start_share=0.2), data=DataConfig(row_tokens=12), logging=LoggingConfig(progress=False),
        checkpoints=CheckpointConfig(every_steps=5),
    )  # fmt: skip
    return Trainer(config, language_model=model, rows=ROWS)


def exchangeable(trainer) -> None:
    """Gates half closed as soon as there are connections, so that there is something to exchange."""
    update = trainer.policy.update

    def closing(clt, activity, step):
        if clt.connected and step == 3:
            for module in clt:
                if module.logits is not None:
                    module.logits.data[:, ::2] = -1.0
        return update(clt, activity, step)

    trainer.policy.update = closing


def test_a_resumed_run_exchanges_the_same(tmp_path):
    model = language_model("gpt2", torch.float32)
    runs = [learning(tmp_path / name, model, open_per_latent=2.0) for name in ("whole", "cut")]
    for t in runs:
        exchangeable(t)
    first = [m.connection_indices for m in runs[0].fit()]
    moved = runs[0].policy.exchange.recent
    assert moved.seen > 50 and any((m.logits == 0.1).any() or m.logits.max() > 0 for m in runs[0].clt if m.upstream)
    runs[1].fit()
    resumed = learning(tmp_path / "cut", model, open_per_latent=2.0)
    resumed.load(tmp_path / "cut", "step_00000005")
    resumed.fit()
    assert all(a is None or torch.equal(a, b.connection_indices) for a, b in zip(first, resumed.clt, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(runs[0].clt.parameters(), resumed.clt.parameters(), strict=True))
    state, again = runs[0].policy.state(), resumed.policy.state()
    assert state.keys() == again.keys() and all(torch.equal(state[name], again[name]) for name in state)


def test_the_pressure_follows_the_number_of_connections_that_is_wanted(model):
    clt = with_gates(model, "frozen", share=0.5)
    for wanted, rises in ((5.0, True), (25.0, False)):
        policy = LearnedConnections(20, pressure=1e-3, open_per_latent=wanted)
        policy.update(clt, None, 1)
        assert (policy.weight > 1e-3) == rises
    policy = LearnedConnections(20, pressure=1e-3)
    policy.update(clt, None, 1)
    assert policy.weight == 1e-3 and policy.state() == {}


def test_no_tensor_of_all_pairs_is_made(model):
    F, most = 2000, 1 << 17  # the decoders themselves are between one and two times as large
    clt = random_clt(model, latents=F, active=4).float()
    recent = RecentGradients(clt.sites, 4, 50, heads=1)
    for module in clt:
        if module.upstream:
            module.connect(torch.randint(module.upstream // 3, (F, 3)) * 3 + torch.arange(3))
            module.logits = torch.nn.Parameter(torch.randn(F, 3))
    recent.values.uniform_()
    recent.gradients.normal_()
    recent.weights.fill_(1.0)
    recent.indices.random_(F)
    recent.sources.copy_(torch.arange(50)[:, None])
    recent.seen.fill_(50)
    recent.batch.fill_(50)
    with LargestAllocation() as largest:
        found = exchange.exchanged_candidates(clt, recent, 0.0, most=2, bytes_at_a_time=4 * most)
    assert found[2].new.any()
    assert largest.elements <= 2 * most < F * 2 * F / 25, f"{largest.by} put out {largest.elements} elements"


def test_exchanged_candidates_fit_where_a_dense_mask_cannot():
    """GPT-2 small with 24,576 latents per module: what connections and their gradients take is linear in F."""
    shape = ModelShape(layers=12, d_model=768, heads=12, parameters=124_439_808, vocab=50_257)
    clt = CLTConfig(latents=24_576, active=32)
    taken = {}
    for policy in ("learned", "dense-learned"):
        config = TrainConfig(clt=clt, connections=ConnectionConfig(policy, 32), device="cpu")
        plan = make_plan(config, shape)
        terms = [term for term in plan.terms if "connections" in term.name or "recent" in term.name]
        taken[policy] = sum(term.bytes for term in terms) / 2**30
    assert taken["learned"] < 1 and taken["dense-learned"] > 1000
