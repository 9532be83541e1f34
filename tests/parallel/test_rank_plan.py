"""The plan's bytes against those that ranks really send."""

from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from sharded_runs import trainer as run_trainer
from sharded_steps import batch, model, own_rows, trainer, with_random_weights

from sparseclt.config import ActivationConfig, CLTConfig, ConnectionConfig, ParallelConfig, TrainConfig
from sparseclt.model.shape import ModelShape
from sparseclt.training import memory
from sparseclt.training.rank_plan import exchanges_ahead, selection_bytes, step_exchanges
from sparseclt.training.run_sizes import RunSizes

GRIDS = {"2 x latents": (2, 1), "4 x latents": (4, 1), "2 x data": (1, 2), "2 x 2": (2, 2)}


def sent_in_a_step(attention: str, latents: int, data: int, **changes) -> tuple[dict[str, int], dict[str, int]]:
    """By collective: the bytes that a step sent, and those of the plan."""
    t = with_random_weights(trainer(attention, {"latents": latents, "data": data}, **changes))
    t.clt.float()
    t.step = 1  # neither the first one, which measures scales, nor one that chooses connections
    t.optimizer = type(t.optimizer)(t.clt, t.config.optimizer, ranks=t.ranks)
    activations = own_rows(t, batch(0))
    for name, value in vars(activations).items():
        if isinstance(value, list):
            setattr(activations, name, [tensor.float() for tensor in value])
    activations.r_0 = activations.r_0.float()
    for module in t.clt:
        _ = module.all_connections  # gathered once
    groups = (t.ranks.latents, t.ranks.data, t.ranks.world)
    before = sum((group.sent for group in groups), Counter())
    t.train_step(activations)
    counted = sum((group.sent for group in groups), Counter()) - before
    planned: Counter[str] = Counter()
    for sent in step_exchanges(RunSizes(t.config, model(attention).shape)):
        planned[sent.collective] += sent.bytes
    return dict(counted), dict(planned)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_step_sends_the_bytes_of_the_plan(ranks, grid):
    for counted, planned in ranks.run(GRIDS[grid][0] * GRIDS[grid][1], sent_in_a_step, "frozen", *GRIDS[grid]):
        assert counted == planned


KINDS = {
    "batchtopk": ("frozen", {"clt__activation": "batchtopk"}),
    "jumprelu": ("frozen", {"clt__activation": "jumprelu"}),
    "exchanged": ("frozen", {"connections__policy": "learned", "connections__open_per_latent": 2.0,
                             "connections__candidates_after_steps": 1}),
    "exchanged, of attention": ("latents", {"connections__policy": "learned",
                                            "connections__candidates_after_steps": 1}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_so_does_one_with_other_exchanges(ranks, kind):
    attention, changes = KINDS[kind]
    for counted, planned in ranks.run(4, partial(sent_in_a_step, attention, 2, 2, **changes)):
        assert counted == planned


def sent_to_choose(attention: str, budget: str) -> tuple[int, int]:
    """The bytes that a rank sent to choose connections, and those of the plan."""
    t = with_random_weights(trainer(attention, {"latents": 4, "data": 1}, connections__budget=budget))
    t.clt.float()
    activations = batch(0)
    t.activity["vanilla"].observe(t.clt(activations, "vanilla").latents, activations)
    for module in t.clt:
        _ = module.all_connections  # those of before
    before = t.ranks.latents.sent.total()
    t.policy.update(t.clt, t.activity["vanilla"], 0)
    return t.ranks.latents.sent.total() - before, selection_bytes(RunSizes(t.config, model(attention).shape))


@pytest.mark.parametrize(("attention", "budget"), [("frozen", "latent"), ("latents", "latent"), ("frozen", "module")])
def test_so_does_a_choice_of_connections(ranks, attention, budget):
    for counted, planned in ranks.run(4, sent_to_choose, attention, budget):
        assert counted == planned


def sent_ahead(changes: dict) -> tuple[int, dict[str, int], dict[str, int]]:
    """By collective: the bytes that a rank sent for one batch of a run of one step, and those of the plan."""
    t = run_trainer(Path("nowhere"), {"latents": 2, "data": 2}, steps=1, **changes)
    list(t.batches.from_step(0))
    ahead = t.ranks.ahead
    planned = {s.collective: s.bytes for s in exchanges_ahead(RunSizes(t.config, t.language_model.shape))}
    return t.ranks.latents.rank, dict(+(ahead.latents.sent + ahead.data.sent)), planned


@pytest.mark.parametrize("shuffle_bytes", [0, 500_000])
def test_activations_are_sent_as_planned(ranks, shuffle_bytes):
    changes = {"activations": ActivationConfig(shuffle_bytes=shuffle_bytes), "connections": ConnectionConfig("none")}
    for rank, counted, planned in ranks.run(4, sent_ahead, changes):
        assert counted == (planned if rank == 0 else {})


def test_attention_readers_send_rows_for_each_head(ranks):
    for counted, planned in ranks.run(2, sent_in_a_step, "latents", 2, 1):
        assert counted == planned


GEMMA = ModelShape(layers=26, d_model=2304, heads=8, vocab=256_000, parameters=2_614_000_000)


def plan(latents: int, data: int = 1):
    config = TrainConfig(
        batch_rows=8, clt=CLTConfig(latents=98_304, active=64, dtype="bf16"), device="cpu",
        connections=ConnectionConfig(per_latent=32), parallel=ParallelConfig(latents=latents, data=data),
    )  # fmt: skip
    return memory.make_plan(replace(config, model=replace(config.model, dtype="bf16")), GEMMA)


def test_ranks_share_the_weights_and_what_is_sent_does_not_grow_with_them():
    one, two, eight = (plan(n) for n in (1, 2, 8))
    assert not one.sent and two.peak < 0.6 * one.peak and eight.peak < two.peak / 2
    held = {term.name: term.bytes for term in eight.terms}
    assert held["weights"] == pytest.approx({t.name: t.bytes for t in one.terms}["weights"] / 8, rel=1e-6)
    assert sum(s.bytes for s in eight.sent if s.collective == "all_to_all") < sum(
        s.bytes for s in two.sent if s.collective == "all_to_all"
    )
    text = memory.table(eight)
    assert "| virtual weights |" in text and "GB/s" in text and "chooses connections" in text
