"""No rank ever holds a whole encoder or decoder, and two need little more than half of what one does."""

import pytest
from held_by_ranks import made_in_a_run, peak_of_a_run
from sharded_steps import D, F, L

KINDS = {
    "top": {},
    "exchanged": {"connections__policy": "learned", "connections__candidates_after_steps": 1,
                  "connections__refresh_steps": 2},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_no_rank_makes_a_tensor_of_a_whole_module(ranks, folder, kind):
    for found in ranks.run(4, made_in_a_run, folder, {"latents": 4, "data": 1}, KINDS[kind]):
        assert found["seen"] > 50
        assert not found["whole"]


def test_one_rank_does(folder):
    assert {(F, D), (F, L, D)} <= made_in_a_run(folder, {"latents": 1, "data": 1}, {})["whole"]


def test_two_ranks_hold_at_most_six_tenths_each_of_what_one_does(ranks, folder):
    two = ranks.run(2, peak_of_a_run, folder, {"latents": 2, "data": 1}, 256, 4096)
    (one,) = ranks.run(1, peak_of_a_run, folder, {"latents": 1, "data": 1}, 256, 4096)
    assert one > 150 << 20
    assert max(two) <= 0.6 * one
