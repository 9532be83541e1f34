"""How many ranks share a CLT where nobody says so."""

from dataclasses import replace

import pytest
from sharded_steps import trainer

from sparseclt.config import CLTConfig, ConnectionConfig, ParallelConfig, TrainConfig
from sparseclt.model.shape import ModelShape
from sparseclt.training import memory
from sparseclt.training.grid import chosen

SHAPE = ModelShape(layers=6, d_model=768, heads=12, vocab=50_257, parameters=82_000_000)
CONFIG = TrainConfig(
    batch_rows=8, device="cpu", clt=CLTConfig(latents=12_288), connections=ConnectionConfig(recent_tokens=1024)
)


def peak(latents: int, world: int) -> int:
    parallel = ParallelConfig(latents=latents, data=world // latents)
    return memory.make_plan(replace(CONFIG, parallel=parallel), SHAPE).peak


@pytest.mark.parametrize("world", [2, 4, 8])
def test_the_fewest_ranks_on_which_it_fits_share_the_clt(world):
    sizes = [n for n in (1, 2, 4, 8) if n <= world]
    for latents in sizes:
        assert chosen(CONFIG, SHAPE, world, peak(latents, world)) == (latents, world // latents)
        if latents < world:
            assert chosen(CONFIG, SHAPE, world, peak(latents, world) - 1)[0] > latents


def test_all_ranks_share_it_where_it_fits_on_none_and_where_memory_is_unknown():
    assert chosen(CONFIG, SHAPE, 4, 1) == (4, 1)
    assert chosen(CONFIG, SHAPE, 4, None) == (4, 1)


def test_what_cannot_be_divided_is_passed_over():
    endless = 1 << 60
    assert chosen(replace(CONFIG, batch_rows=2), SHAPE, 4, endless) == (2, 2)
    assert chosen(replace(CONFIG, batch_rows=3), SHAPE, 4, endless) == (4, 1)
    odd = replace(CONFIG, batch_rows=2, clt=CLTConfig(latents=12_289))
    assert chosen(odd, SHAPE, 4, endless) == (4, 1)  # and that is refused, with the number's name


def grid(given: dict[str, int]) -> tuple[int, int]:
    t = trainer("frozen", given)
    return t.ranks.latents.size, t.ranks.data.size


@pytest.mark.parametrize(
    ("given", "expected"), [({}, (1, 4)), ({"latents": 2}, (2, 2)), ({"data": 1}, (4, 1)), ({"data": 4}, (1, 4))]
)
def test_numbers_that_are_given_hold(ranks, given, expected):
    assert set(ranks.run(4, grid, given)) == {expected}
