"""Loggers: exact lines that survive a crash, and three adapters that import nothing unasked."""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseclt.training.loggers import JsonLinesLogger, make_loggers, read_metrics, truncate_after


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "metrics.jsonl"


def write_steps(path: Path, *steps: int) -> None:
    logger = JsonLinesLogger(path)
    for step in steps:
        logger.log(step, {"fvu": step / 7})
    logger.close()


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_every_line_is_one_json_object_with_exact_numbers(path: Path) -> None:
    logger = JsonLinesLogger(path)
    logger.log(3, {"fvu": 0.1 + 0.2, "tokens": 2**60 + 1, "tensor": torch.tensor(0.1)})  # type: ignore[dict-item]
    rows = [json.loads(line) for line in path.read_text().splitlines()]  # readable before close: flushed
    assert rows == [{"step": 3, "fvu": 0.1 + 0.2, "tokens": 2**60 + 1, "tensor": torch.tensor(0.1).item()}]
    assert read_metrics(path) == rows
    logger.close()


def test_nan_and_infinity_are_recorded(path: Path) -> None:
    logger = JsonLinesLogger(path)
    logger.log(0, {"a": math.nan, "b": -math.inf})
    logger.close()
    (row,) = read_metrics(path)
    assert math.isnan(row["a"]) and row["b"] == -math.inf


def test_reopening_appends(path: Path) -> None:
    write_steps(path, 1, 2)
    write_steps(path, 3)
    assert steps(path) == [1, 2, 3]


def test_a_torn_last_line_is_left_out_and_not_glued_to_the_next(path: Path) -> None:
    write_steps(path, 1, 2)
    with path.open("ab") as file:
        file.write(b'{"step": 3, "fv')
    assert steps(path) == [1, 2]
    write_steps(path, 3)
    assert steps(path) == [1, 2, 3]


def test_truncate_drops_later_steps_and_a_torn_line_and_keeps_the_rest_as_is(path: Path) -> None:
    write_steps(path, 1, 2)
    kept = path.read_bytes()
    write_steps(path, 3, 4)
    with path.open("ab") as file:
        file.write(b'{"step": 1, "fv')
    truncate_after(path, 2)
    assert path.read_bytes() == kept
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_truncate_drops_only_the_torn_line_if_no_step_is_later(path: Path) -> None:
    write_steps(path, 1, 2)
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"st')
    truncate_after(path, 2)
    assert path.read_bytes() == kept


def test_truncate_of_a_missing_file_does_nothing(path: Path) -> None:
    truncate_after(path, 2)
    assert not path.exists()


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"fvu": 1}'])
def test_a_malformed_line_is_named(path: Path, line: str) -> None:
    write_steps(path, 1)
    content = path.read_text() + line + "\n"
    path.write_text(content)
    for read in (read_metrics, lambda path: truncate_after(path, 0)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not"):
            read(path)
    assert path.read_text() == content


def test_a_metric_cannot_shadow_the_step(path: Path) -> None:
    logger = JsonLinesLogger(path)
    with pytest.raises(ValueError, match='must not have the key "step"'):
        logger.log(1, {"step": 2.0})
    logger.close()


class FakeRun:
    def __init__(self, calls: list[Any]) -> None:
        self.calls = calls

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append(("log", metrics, step))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_run_adapters_pass_config_metrics_and_step(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def init(**kwargs: Any) -> FakeRun:
        calls.append(kwargs)
        return FakeRun(calls)

    monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))  # type: ignore[arg-type]
    (logger,) = make_loggers([name], tmp_path / "run7", {"k": 4})
    logger.log(5, {"fvu": torch.tensor(0.5)})  # type: ignore[dict-item]
    logger.close()
    own = {"wandb": {"dir": str(tmp_path / "run7")}, "trackio": {"resume": "allow"}}[name]
    assert calls[0] == {"project": "sparseclt", "name": "run7", "config": {"k": 4}, **own}
    assert calls[1:] == [("log", {"fvu": 0.5}, 5), "finish"]
    assert type(calls[1][1]["fvu"]) is float


def test_tensorboard_adapter_writes_scalars_and_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            calls.append(log_dir)

        def __getattr__(self, method: str) -> Any:
            return lambda *args: calls.append((method, *args))

    module = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)  # type: ignore[arg-type]
    (logger,) = make_loggers(["tensorboard"], tmp_path, {"k": 4})
    logger.log(5, {"fvu": 0.5, "dead": 0.25})
    logger.close()
    assert calls[0] == str(tmp_path / "tensorboard")
    assert calls[1][:2] == ("add_text", "config") and json.loads(calls[1][2]) == {"k": 4}
    assert calls[2:] == [("add_scalar", "fvu", 0.5, 5), ("add_scalar", "dead", 0.25, 5), ("close",)]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_library_is_named_with_its_pip_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]  # an import of it now fails
    with pytest.raises(ValueError, match=f"'{name}'.*pip install {name}"):
        make_loggers([name], tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
    assert make_loggers([], tmp_path / "run", {}) == []  # unnamed, it is not imported


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown logger 'mlflow', expected any of wandb, trackio, tensorboard"):
        make_loggers(["mlflow"], tmp_path, {})
    with pytest.raises(TypeError, match="got the string 'wandb'"):
        make_loggers("wandb", tmp_path, {})
