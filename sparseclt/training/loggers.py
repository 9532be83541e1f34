"""Where training metrics go: always a JSON-lines file, and by name also wandb, trackio or tensorboard."""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sparseclt.config import LoggingConfig
from sparseclt.model.sites import MODES
from sparseclt.storage.json_files import naming

PROJECT = "sparseclt"


class Logger(Protocol):
    """What the trainer asks of a logger."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of one step; values are numbers or one-element tensors."""

    def close(self) -> None:
        """Finish writing; the logger is not used afterwards."""


class JsonLinesLogger:
    """One JSON object a line, {"step": ..., metrics ...}, appended to `path` and flushed each line.

    Floats are exact. NaN and infinities are written as NaN and Infinity, which Python's json reads and strict
    parsers do not. A torn last line, left by a crash, is removed on opening.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)
        self._path, self._file = path, path.open("a", encoding="utf-8")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line. Raises ValueError if a metric is called "step"."""
        if "step" in metrics:
            raise ValueError('metrics must not have the key "step", which is the line\'s own: rename it')
        line = {"step": step} | _plain_numbers(metrics)
        with naming(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._file.close()


class _RunLogger:
    """A wandb or trackio run: both offer `log(dict, step=)` and `finish()`."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(_plain_numbers(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoardLogger:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in _plain_numbers(metrics).items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class RunLog:
    """The metrics of a run and its progress bar: every so many steps a line in `run_dir`/metrics.jsonl and in each
    logger that is named in `config`. `settings` are shown beside the curves."""

    def __init__(self, config: LoggingConfig, run_dir: Path, settings: dict[str, Any], steps: int, done: int):
        from tqdm import tqdm

        self.every, self.steps = config.every_steps, steps
        named = make_loggers(config.loggers, run_dir, settings)
        self._loggers: list[Logger] = [JsonLinesLogger(run_dir / "metrics.jsonl"), *named]
        self._bar = tqdm(total=steps, initial=done, desc="training", unit="step", disable=not config.progress)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of a finished step, counted from 1; the last one is always logged."""
        self._bar.update()
        if step == self.steps or step % self.every == 0:
            for logger in self._loggers:
                logger.log(step, metrics)
            shown = {name: metrics[f"fvu_{name}"] for name in MODES if f"fvu_{name}" in metrics}
            self._bar.set_postfix({f"FVU {name}": f"{value:.3f}" for name, value in shown.items()})

    def close(self) -> None:
        """Finish writing."""
        self._bar.close()
        for logger in self._loggers:
            logger.close()


def make_loggers(names: Sequence[str], run_dir: str | Path, config: dict[str, Any]) -> list[Logger]:
    """The loggers of a run that were asked for by name, in order; a run also keeps a JsonLinesLogger always.

    names: any of "wandb", "trackio", "tensorboard"; a library is imported only if it is named.
    config: the run's settings, shown beside its curves.
    A resumed run continues its files and its trackio run; in wandb it is a new run of the same name.

    Raises ValueError for an unknown name or a library that is not installed, before anything is opened.
    """
    if isinstance(names, str):
        raise TypeError(f"names must be a sequence of logger names, got the string {names!r}: use [{names!r}]")
    run_dir = Path(run_dir)
    for name in names:
        if name not in _OPENERS:
            raise ValueError(f"names has the unknown logger {name!r}, expected any of {', '.join(_OPENERS)}")
    modules = [_import(name) for name in names]
    return [_OPENERS[name](module, run_dir, config) for name, module in zip(names, modules, strict=True)]


def truncate_after(path: str | Path, step: int) -> None:
    """Drop the lines of a metrics file with a step above `step`, so that a resumed run logs no step twice.

    A torn last line is dropped too, and a missing file stays missing.
    Raises ValueError for any other malformed line.
    """
    path = Path(path)
    if not path.exists():
        return
    _drop_torn_line(path)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line, row in zip(lines, read_metrics(path), strict=True) if row["step"] <= step]
    if len(kept) < len(lines):
        # A whole new file put in place at once: a crash here must not lose the lines that stay.
        replacement = path.with_name(f"{path.name}.tmp")
        with naming(replacement):
            replacement.write_bytes(b"".join(kept))
        replacement.replace(path)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics file as dicts, in order; a torn last line is left out.

    Raises ValueError, naming the line, if another line is not a JSON object with a whole "step".
    """
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON ({error}): repair or remove the line") from error
        if not isinstance(row, dict) or type(row.get("step")) is not int:
            raise ValueError(f'{path}, line {number} is not an object with a whole "step": repair or remove the line')
        rows.append(row)
    return rows


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        complete = content.rfind(b"\n") + 1
        if complete < len(content):
            with path.open("r+b") as file:
                file.truncate(complete)


def _plain_numbers(metrics: Mapping[str, Any]) -> dict[str, int | float]:
    """Python numbers, which every library and JSON take; int stays int, so that token counts stay exact."""
    return {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}


def _open_wandb(module: Any, run_dir: Path, config: dict[str, Any]) -> Logger:
    return _RunLogger(module.init(project=PROJECT, name=run_dir.name, dir=str(run_dir), config=config))


def _open_trackio(module: Any, run_dir: Path, config: dict[str, Any]) -> Logger:
    return _RunLogger(module.init(project=PROJECT, name=run_dir.name, config=config, resume="allow"))


def _open_tensorboard(module: Any, run_dir: Path, config: dict[str, Any]) -> Logger:
    writer = module.SummaryWriter(log_dir=str(run_dir / "tensorboard"))
    writer.add_text("config", json.dumps(config, indent=2, default=str))
    return _TensorBoardLogger(writer)


_OPENERS: dict[str, Callable[[Any, Path, dict[str, Any]], Logger]] = {
    "wandb": _open_wandb,
    "trackio": _open_trackio,
    "tensorboard": _open_tensorboard,
}


def _import(name: str) -> Any:
    try:
        return importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
    except ImportError as error:
        raise ValueError(f"the logger {name!r} needs a library that is missing: pip install {name}") from error
