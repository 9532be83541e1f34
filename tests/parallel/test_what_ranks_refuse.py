"""What ranks cannot do together is said before anything begins."""

import time

import pytest
import torch
from sharded_steps import trainer

from sparseclt.cli import main

REFUSED = {
    "a grid of another size": (
        {"latents": 3}, {}, r"parallel.latents, parallel.data: expected numbers whose product is 2.*torchrun"
    ),
    "latents that cannot be shared": ({"latents": 2}, {"clt__latents": 17}, "clt.latents: expected a multiple of 2"),
    "rows that cannot be shared": ({"data": 2}, {"batch_rows": 3}, "batch_rows: expected a multiple of parallel.data"),
    "a penalty on whole decoders": ({"latents": 2}, {"loss__interaction_weight": 1.0}, "loss.interaction_weight: expe"),
}  # fmt: skip


def message(parallel, changes) -> str:
    try:
        trainer("frozen", parallel, **changes)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_on_every_rank(ranks, case):
    parallel, changes, expected = REFUSED[case]
    for said in ranks.run(2, message, parallel, changes):
        pytest.raises(ValueError, _raise, said).match(expected)


def _raise(text: str) -> None:
    raise ValueError(text)


def test_commands_that_do_not_train_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["eval", "nowhere"]) == 2
    assert (
        "eval: expected a single process, got 2; only train, resume and repeat run on several"
        in capsys.readouterr().err
    )


def test_a_single_process_is_no_group():
    with pytest.raises(
        ValueError, match="expected numbers whose product is 1, .*got 2 and 1; start them with torchrun"
    ):
        trainer("frozen", {"latents": 2})


def late(seconds: float) -> float | None:
    """The first rank waits for one that comes too late: after how many seconds it ends with an error."""
    t = trainer("frozen", {"latents": 2, "data": 1, "timeout_seconds": 2})
    group, start = t.ranks.latents, time.monotonic()
    if group.rank == 1:
        time.sleep(seconds)
        return None
    with pytest.raises(RuntimeError):
        group.sum_(torch.ones(3))
    return time.monotonic() - start


@pytest.mark.parametrize("seconds", [0, 8], ids=["gone", "late"])
def test_a_rank_that_does_not_come_ends_the_wait_of_the_others(ranks, seconds):
    assert ranks.run(2, late, seconds)[0] < 8
