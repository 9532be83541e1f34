"""What a run directory says about its run, and what may change when it goes on."""

from dataclasses import replace
from pathlib import Path

import pytest

from sparseclt.config import (
    ActivationConfig,
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    TrainConfig,
)
from sparseclt.storage.json_files import replace_file
from sparseclt.storage.run_config import check_changes, check_unused, read_config, write_config

HERE = Path("runs/mine")


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 900},
        {"device": "cpu"},
        {"out": "runs/moved"},
        {"logging": LoggingConfig(every_steps=3, loggers=("wandb",), progress=False)},
        {"checkpoints": CheckpointConfig(every_steps=7, every_minutes=1.5, keep=9)},
        {"activations": ActivationConfig(cache="/other/disk")},
        {"compute": ComputeConfig(micro_batch_rows=1, backend="torch")},
        {"model": ModelConfig(path="/other/model")},
        {"data": DataConfig(source="/other/text.txt", cache="/other/tokens")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_change_the_weights_may_change(changes):
    stored = TrainConfig(activations=ActivationConfig(cache="here"))
    check_changes(stored, replace(stored, **changes), HERE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"seed \(0 there, now 1\)"),
        ({"batch_rows": 2}, r"batch_rows \(4 there, now 2\)"),
        ({"loss": LossConfig(l0_weight=0.5)}, r"loss.l0_weight \(1.0 there, now 0.5\)"),
        ({"activations": ActivationConfig(cache="here")}, r"activations.cache \(None there, now 'here'\)"),
        ({"data": DataConfig(row_tokens=64)}, r"data.row_tokens \(128 there, now 64\)"),
        ({"seed": 1, "batch_rows": 2}, r"batch_rows .*, seed "),
    ],
)
def test_what_changes_the_weights_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=f"resume: these options change what runs/mine trains: {message}"):
        check_changes(TrainConfig(), TrainConfig(**changes), HERE)


def test_a_run_that_saved_nothing_yet_may_be_begun_again(tmp_path):
    check_unused(tmp_path / "absent")
    write_config(tmp_path, TrainConfig())
    check_unused(tmp_path)
    (tmp_path / "checkpoints" / "step_00000004.tmp").mkdir(parents=True)
    check_unused(tmp_path)


@pytest.mark.parametrize("kept", ["clt", "checkpoints/step_00000004", "checkpoints/step_00000004.damaged"])
def test_a_run_with_anything_to_lose_is_not_overwritten(tmp_path, kept):
    write_config(tmp_path, TrainConfig())
    (tmp_path / kept).mkdir(parents=True)
    with pytest.raises(ValueError, match="already holds a run"):
        check_unused(tmp_path)


def test_a_file_is_no_run_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out: expected a directory .* is a file"):
        check_unused(tmp_path / "file")


def test_a_configuration_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_config(tmp_path, TrainConfig(steps=3))

    def crash(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", crash)
        write_config(tmp_path, TrainConfig(steps=4))
    assert read_config(tmp_path) == TrainConfig(steps=3)
    replace_file(tmp_path / "config.json", "{}")
    assert read_config(tmp_path) == TrainConfig() and [p.name for p in tmp_path.iterdir()] == ["config.json"]
