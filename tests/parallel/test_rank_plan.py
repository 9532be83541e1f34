"""The plan's bytes against those that ranks really send."""

from collections import Counter
from dataclasses import replace

import pytest
from sharded_steps import batch, model, own_rows, trainer, with_random_weights

from sparseclt.config import CLTConfig, ConnectionConfig, ParallelConfig, TrainConfig
from sparseclt.model.shape import ModelShape
from sparseclt.training import memory
from sparseclt.training.rank_plan import step_exchanges
from sparseclt.training.run_sizes import RunSizes

GRIDS = {"2 x latents": (2, 1), "4 x latents": (4, 1), "2 x data": (1, 2), "2 x 2": (2, 2)}


def sent_in_a_step(attention: str, latents: int, data: int) -> tuple[dict[str, int], dict[str, int]]:
    """By collective: the bytes that a step sent, and those of the plan."""
    t = with_random_weights(trainer(attention, {"latents": latents, "data": data}))
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
