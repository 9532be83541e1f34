"""Checkpoints do not know how many ranks wrote them."""

import errno
import os
import shutil
import signal

import pytest
import torch
from sharded_runs import evaluated, fit, fit_in_bf16, loaded, save_again, trainer

from sparseclt.config import CheckpointConfig
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.checkpoint import latest
from sparseclt.storage.directories import verify
from sparseclt.training.loggers import read_metrics

FOUR, TWO, ONE = {"latents": 4, "data": 1}, {"latents": 2, "data": 2}, {"latents": 1, "data": 1}


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """A run of 6 steps on 4 ranks."""
    out = tmp_path_factory.mktemp("run") / "run"
    ranks.run(4, fit, out, FOUR)
    return out


def contents(folder) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_a_run_on_four_ranks_leaves_what_one_rank_leaves(run, tmp_path):
    fit(tmp_path / "one", ONE)
    files = {f.relative_to(run) for f in run.rglob("*")}
    assert files == {f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*")}
    ours, theirs = (read_metrics(folder / "metrics.jsonl") for folder in (run, tmp_path / "one"))
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-4)  # fp32
    assert SparseCLT.from_pretrained(run / "clt").connected


def test_half_precision_and_small_moments_come_to_about_the_same(ranks, tmp_path):
    fit_in_bf16(tmp_path / "one", ONE)
    ranks.run(4, fit_in_bf16, tmp_path / "several", TWO)
    for a, b in zip(*(read_metrics(tmp_path / name / "metrics.jsonl") for name in ("several", "one")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)
    weights = SparseCLT.from_pretrained(tmp_path / "several" / "clt").transcoder(0).W_dec
    assert weights.dtype == torch.bfloat16 and weights.isfinite().all() and weights.abs().sum() > 0


@pytest.mark.parametrize("parallel", [ONE, TWO, FOUR], ids=["one", "2 x 2", "four"])
def test_what_four_ranks_saved_and_others_load_and_save_again_is_the_same_to_the_byte(ranks, run, tmp_path, parallel):
    n = parallel["latents"] * parallel["data"]
    if n == 1:
        save_again(run, tmp_path / "copy", parallel)
    else:
        ranks.run(n, save_again, run, tmp_path / "copy", parallel)
    saved, again = latest(run), latest(tmp_path / "copy")
    verify(again)
    assert contents(again) == contents(saved)


def test_a_run_begun_on_two_ranks_goes_on_on_four_and_on_one(ranks, run, tmp_path):
    short = {"checkpoints": CheckpointConfig(every_steps=3, keep=9)}
    ranks.run(2, _fit, tmp_path / "run", {"latents": 2, "data": 1}, {"steps": 6, **short}, 3)
    ranks.run(4, _fit, tmp_path / "run", TWO, {"steps": 6, **short}, 5)
    _fit(tmp_path / "run", ONE, {"steps": 6, **short}, None)
    for a, b in zip(*(read_metrics(folder / "metrics.jsonl") for folder in (run, tmp_path / "run")), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def _fit(out, parallel, changes, stop_after):
    """Go on until a signal that the last rank gets stops the run after some step."""
    t = trainer(out, parallel, **changes)
    step = t.train_step

    def stopping(activations):
        metrics = step(activations)
        if t.step == stop_after and t.ranks.world.rank == t.ranks.world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    t.train_step = stopping
    try:
        t.fit(resume=out if (out / "config.json").exists() else None)
    except KeyboardInterrupt:
        assert stop_after == t.step


def _killed(out, rank, moment):
    """One step more than there is, and `rank` is killed in the middle of saving it: before the ranks agree for the
    `moment`th time that all has gone well so far."""
    from sparseclt.storage import parts, safetensors_stream

    t = trainer(out, {"latents": 2, "data": 1})
    t.load(out)
    t.step += 1
    agree, times = parts.agree, iter(range(1000))

    def fatal(group, error):
        if next(times) == moment and group.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        agree(group, error)

    parts.agree = fatal
    assert safetensors_stream.write_together.__globals__["agree"] is fatal
    t.save()


@pytest.mark.parametrize(("rank", "moment"), [(1, 0), (0, 3), (1, 12), (0, 18), (1, 18)])
def test_a_rank_killed_in_the_middle_of_a_save_leaves_the_checkpoint_before(ranks, run, tmp_path, rank, moment):
    copy = shutil.copytree(run, tmp_path / "run")
    statuses = ranks.once(2, _killed, copy, rank, moment)
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] != 0
    newest = latest(copy)
    verify(newest)
    # The last time they agree, the directory is whole, and in its place.
    assert newest.name == ("step_00000007" if moment == 18 else "step_00000006")
    assert loaded(copy, ONE, steps=9)["step"] == int(newest.name[-1])


def _full_disk(out):
    t = trainer(out, {"latents": 2, "data": 1})
    t.load(out)
    t.step += 1
    own = os.fsync

    def full(descriptor):
        if t.ranks.world.rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(descriptor)

    os.fsync = full
    try:
        t.save()
    except OSError as error:
        return str(error)
    finally:
        os.fsync = own
    return "saved"


def test_a_full_disk_on_one_rank_is_an_error_on_all_that_names_it(ranks, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    for said in ranks.run(2, _full_disk, copy):
        assert said.startswith("rank 1 of 2: [Errno 28] No space left on device") and ".safetensors" in said
    assert sorted(path.name for path in (copy / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]


def flat(values, name=""):
    if isinstance(values, dict):
        return {k: v for key, value in values.items() for k, v in flat(value, f"{name}/{key}").items()}
    if isinstance(values, list | tuple):
        return {k: v for i, value in enumerate(values) for k, v in flat(value, f"{name}/{i}").items()}
    return {name: values} if isinstance(values, int | float) else {}


@pytest.mark.parametrize("parallel", [FOUR, TWO], ids=["four", "2 x 2"])
def test_ranks_evaluate_together_what_one_evaluates(ranks, run, parallel):
    expected = flat(evaluated(run, ONE))
    assert expected["/cross_entropy/sparse"] and expected["/modules/2/connections_in_effect"]
    for result in ranks.run(4, evaluated, run, parallel):
        assert flat(result) == pytest.approx(expected, rel=1e-4, abs=1e-5)
