"""Runs that are stopped, moved, resumed, extended and evaluated with the command."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import material  # noqa: F401  the fixture

from sparseclt import runs
from sparseclt.cli import main
from sparseclt.config import TrainConfig
from sparseclt.evaluation import plots
from sparseclt.language_model import language_model
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.runs import measurement
from sparseclt.storage.run_config import read_config
from sparseclt.training.loggers import read_metrics
from sparseclt.training.trainer import Trainer


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):  # noqa: F811
    """A finished run of 6 steps, with bf16 weights."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert main(["train", *material, "--out", str(out), "--clt.dtype", "bf16"]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, elsewhere."""
    return shutil.copytree(finished, tmp_path / "copy")


def one_line(capsys) -> str:
    error = capsys.readouterr().err
    assert error.startswith("sparseclt: ") and error.count("\n") == 1, error
    return error


def test_resume_takes_more_steps_and_other_intervals_and_keeps_the_rest(run, capsys):
    flags = ["--steps", "8", "--logging.every-steps", "2", "--checkpoints.keep", "1", "--device", "cpu"]
    before = read_config(run)
    assert main(["resume", str(run), *flags]) == 0
    assert "mlp_2" in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6, 8]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000008"]
    stored = read_config(run)
    assert (stored.steps, stored.logging.every_steps, stored.out) == (8, 2, str(run))
    assert (stored.clt, stored.connections, stored.data) == (before.clt, before.connections, before.data)


def test_resume_of_a_finished_run_says_so_and_evaluates_it(run, capsys):
    (run / "table.md").unlink()
    assert main(["resume", str(run)]) == 0
    assert "has done all its 6 steps" in capsys.readouterr().out and (run / "table.md").exists()


def test_a_warning_of_ours_is_one_line(run):
    file = run / "checkpoints" / "step_00000006" / "W_enc_0.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    command = [sys.executable, "-m", "sparseclt", "resume", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and done.stderr.count("\n") == 1, done.stderr
    assert re.fullmatch(r"sparseclt: .*W_enc_0.safetensors has .* is now step_00000006.damaged, .*\n", done.stderr)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "3"], "resume: these options change what "),
        (["--clt.latents", "30"], "clt.latents (24 there, now 30)"),
        (["--steps", "5"], "steps: expected at least the 6 that"),
        (["--checkpoint", "step_00000001"], "checkpoint: expected one of"),
        (["--clt.active", "99"], "clt.active: expected at most clt.latents = 24, got 99"),
    ],
)
def test_what_resume_cannot_do_is_one_line(run, capsys, flags, message):
    assert main(["resume", str(run), *flags]) == 2
    assert message in one_line(capsys)


def test_resume_wants_the_run_before_its_options(run, capsys):
    assert main(["resume", "--steps", "8", str(run)]) == 2
    assert "resume: expected the run directory before all options, got --steps" in one_line(capsys)
    assert main(["resume", str(run / "clt")]) == 2
    assert "run: expected a run directory with config.json" in one_line(capsys)


def test_the_help_of_resume_shows_the_values_of_the_run(run, capsys):
    with pytest.raises(SystemExit):
        main(["resume", str(run), "--help"])
    assert "default: bf16" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_a_directory_that_is_taken_is_refused_before_anything_is_loaded(run, material, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(LanguageModel, "load", lambda *a, **k: pytest.fail("the language model was loaded"))
    for arguments in (["train", *material, "--out", str(run)], ["repeat", str(run), str(run)]):
        assert main(arguments) == 2
        assert "already holds a run" in one_line(capsys)
    shutil.copytree(run, run / "C_2")
    assert main(["sweep", *material, "--out", str(run), "--connections", "2", "--clt.dtype", "fp32"]) == 2
    assert "clt.dtype ('bf16' there, now 'fp32')" in one_line(capsys)


@pytest.mark.parametrize("what", ["model", "text", "held-out text"])
def test_a_start_that_fails_leaves_no_directory(material, tmp_path, capsys, what):  # noqa: F811
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.txt").write_text("w1 w2 w3 " * 30)
    (text / "held_out.txt").write_text("w1")
    bad = {
        "model": ["--model.path", "./nowhere"],
        "text": ["--data.source", str(text / "held_out.txt")],
        "held-out text": ["--data.source", str(text)],
    }
    assert main(["train", *material, "--out", str(tmp_path / "new" / "run"), *bad[what]]) == 2
    assert one_line(capsys) and [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_run_is_evaluated_where_and_as_it_was_trained(run, monkeypatch, capsys):
    seen, asked = [], []
    evaluate, usable = measurement.evaluate, language_model.usable
    monkeypatch.setattr(measurement, "evaluate", lambda clt, *a, **k: seen.append(clt) or evaluate(clt, *a, **k))
    monkeypatch.setattr(language_model, "usable", lambda name: asked.append(name) or usable("cpu"))
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "device": "cuda:3"}))
    before = json.loads((run / "evaluation.json").read_text())
    assert main(["eval", str(run)]) == 0
    assert main(["eval", str(run), "--device", "cuda:1"]) == 0
    assert asked == ["cuda:3", "cuda:1"]
    assert {p.dtype for clt in seen for p in clt.parameters()} == {torch.bfloat16}
    assert json.loads((run / "evaluation.json").read_text()) == before


def test_a_checkpoint_can_be_evaluated(run, capsys):
    before = json.loads((run / "evaluation.json").read_text())
    assert main(["eval", str(run), "--checkpoint", "step_00000003"]) == 0
    assert json.loads((run / "evaluation.json").read_text())["mean"] != before["mean"]


def test_a_run_under_way_is_not_evaluated_as_if_it_were_finished(run, capsys):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": 9}))
    assert main(["eval", str(run)]) == 2
    assert "has saved 6 of 9 steps; finish it with sparseclt resume" in one_line(capsys)


def test_a_run_is_not_evaluated_on_another_model(run, capsys):
    from clts import language_model

    with pytest.raises(ValueError, match="the weights of the language model are not those"):
        runs.evaluate_run(run, language_model("llama", torch.float32))


def test_a_device_that_is_not_there_is_one_line(run, capsys):
    assert main(["eval", str(run), "--device", "cuda:99"]) == 2
    assert "device: expected one that this machine has, got 'cuda:99'" in one_line(capsys)


def test_a_terminated_run_exits_with_143_and_goes_on_elsewhere(material, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "here"
    flags = [*material, "--out", str(out), "--steps", "100000", "--checkpoints.every-steps", "100000"]
    command = [sys.executable, "-m", "sparseclt", "train", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            deadline = time.monotonic() + 300
            while not (out / "metrics.jsonl").exists() or not read_metrics(out / "metrics.jsonl"):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            error = process.stderr.read()
        finally:
            process.kill()
    assert process.returncode == 143, error
    done = int(next((out / "checkpoints").iterdir()).name.removeprefix("step_"))
    assert error == (
        f"sparseclt: SIGTERM after step {done} of 100000, which is saved; sparseclt resume {out} goes on from there\n"
    )
    moved = Path(shutil.move(out, tmp_path / "there"))
    assert main(["resume", str(moved), "--steps", str(done + 2)]) == 0
    assert read_metrics(moved / "metrics.jsonl")[-1]["step"] == done + 2 and not out.exists()


def interrupt_at(monkeypatch, name: str, step: int) -> None:
    """SIGINT in step `step` of the run in the directory called `name`, once."""
    original, left = Trainer.train_step, [1]

    def train_step(self, activations):
        if self.out.name == name and self.step == step and left:
            left.pop()
            signal.raise_signal(signal.SIGINT)
        return original(self, activations)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.fixture
def usual_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def no_pictures(monkeypatch):
    """They take most of the time of such short runs."""
    for name in ("densities", "fvu_against_c", "loss_curves"):
        monkeypatch.setattr(plots, name, lambda *a, **k: None)


def test_a_sweep_goes_on_where_it_stopped(material, tmp_path, capsys, monkeypatch, no_pictures, usual_handler):  # noqa: F811
    flags = ["sweep", *material, "--steps", "3", "--checkpoints.every-steps", "3", "--connections", "2", "8"]
    flags += ["--no-random", "--out"]
    assert main([*flags, str(tmp_path / "whole")]) == 0
    interrupt_at(monkeypatch, "C_8", 1)
    assert main([*flags, str(tmp_path / "cut")]) == 130
    assert "SIGINT after step 2 of 3" in capsys.readouterr().err
    kept = (tmp_path / "cut" / "C_2" / "clt" / "manifest.json").stat().st_mtime_ns
    trained = []
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, a: trained.append(self.out.name) or step(self, a))
    assert main([*flags, str(tmp_path / "cut")]) == 0
    assert trained == ["C_8"]
    assert (tmp_path / "cut" / "C_2" / "clt" / "manifest.json").stat().st_mtime_ns == kept
    whole, cut = (json.loads((tmp_path / name / "sweep.json").read_text()) for name in ("whole", "cut"))
    assert whole == cut
    capsys.readouterr()
    assert main([*flags, str(tmp_path / "cut"), "--steps", "9"]) == 2
    assert "steps: expected the 3 that" in one_line(capsys)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--connections", "2", "49"], "connections.per_latent: expected 0 to 48"),
        (["--connections", "2", "2"], "connections: expected numbers of connections, each once, got [2, 2]"),
        (["--connections", "2", "--connections.policy", "none"], "connections.policy: expected 'top' or 'learned'"),
    ],
)
def test_a_sweep_refuses_what_cannot_be_trained_before_it_trains(material, tmp_path, capsys, flags, message):  # noqa: F811
    assert main(["sweep", *material, "--out", str(tmp_path / "sweep"), *flags]) == 2
    assert message in one_line(capsys) and list(tmp_path.iterdir()) == []


def test_a_sweep_frees_each_run_before_the_next_one(material, tmp_path, monkeypatch, no_pictures):  # noqa: F811
    alive: list[weakref.ref] = []
    counts = []
    original = Trainer.__init__

    def init(self, *a, **k):
        counts.append(sum(reference() is not None for reference in alive))
        original(self, *a, **k)
        alive.extend([weakref.ref(self), weakref.ref(self.clt), weakref.ref(self.optimizer)])

    monkeypatch.setattr(Trainer, "__init__", init)
    assert main(["sweep", *material, "--steps", "2", "--connections", "0", "4", "--out", str(tmp_path / "s")]) == 0
    assert counts == [0, 0, 0, 0], "baseline, C = 0, C = 4, 4 random ones"


def test_from_run_takes_changes(run):
    t = Trainer.from_run(run, steps=7)
    assert t.config == replace(read_config(run), steps=7, out=str(run)) != TrainConfig()
    t.fit(resume=run)
    assert t.step == 7
