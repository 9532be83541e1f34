"""Several runs, one after the other, which share the language model and the text."""

import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.data.text import load_rows
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.runs.measurement import held_out_rows
from sparseclt.storage.json_files import read_json, replace_file
from sparseclt.storage.run_config import CONFIG, check_changes, check_unused, read_config
from sparseclt.training import memory
from sparseclt.training.run_directory import steps_done
from sparseclt.training.trainer import Trainer

TIMING = "timing.json"


class Series:
    """Runs of `configs`. Finished ones are kept, one under way is resumed.

    Raises ValueError, before anything is loaded, for a run with other options in the place of one of `configs`.
    """

    def __init__(self, configs: Sequence[TrainConfig]):
        for config in configs:
            _check_begun(config)
        self._model: tuple[object, LanguageModel] | None = None
        self._rows: tuple[object, Tensor] | None = None
        self._held_out: tuple[object, Tensor] | None = None

    def check_fits(self, configs: Sequence[TrainConfig]) -> None:
        """A ValueError if one of `configs`, all of one language model, does not fit into memory."""
        model = self.language_model(configs[0])
        shape, available = replace(model.shape, parameters=0), memory.available_bytes(model.device)
        for config in configs:
            memory.check_fits(config, shape, available)

    def language_model(self, config: TrainConfig) -> LanguageModel:
        """That of `config`: the one of the run before, if it has the same."""
        key = (config.model, config.device)
        if self._model is None or self._model[0] != key:
            self._model = None  # before the next one is loaded
            self._model = key, LanguageModel.of(config)
        return self._model[1]

    def held_out(self, config: TrainConfig) -> Tensor:
        """Its rows [R, S] for evaluation."""
        key = _text_of(config)
        if self._held_out is None or self._held_out[0] != key:
            self._held_out = key, held_out_rows(config, self.language_model(config))
        return self._held_out[1]

    def fit(self, config: TrainConfig) -> SparseCLT:
        """Its trained CLT. How long it trained is in `timing.json` of its run directory (`seconds_of`)."""
        model = self.language_model(config)
        self.held_out(config)  # before the training: text that is missing is found at once
        key = _text_of(config)
        if self._rows is None or self._rows[0] != key:
            self._rows = key, load_rows(config, model.tokenizer, "train")
        _release_memory(model.device)
        trainer, begun = Trainer(config, language_model=model, rows=self._rows[1]), begun_run(config)
        with nullcontext() if is_finished(config) else _timed(trainer.out):
            return trainer.fit(resume=trainer.out if begun else None)


def begun_run(config: TrainConfig) -> bool:
    """Whether there is a run in `config.out`."""
    return (Path(config.out) / CONFIG).exists()


def is_finished(config: TrainConfig) -> bool:
    """Whether the run in `config.out` has done all its steps."""
    return begun_run(config) and steps_done(Path(config.out)) == config.steps


def seconds_of(run: str | Path) -> float | None:
    """Wall-clock seconds for which the run in directory `run` was trained, over all its starts; None: not known, as one
    of them was killed."""
    path = Path(run) / TIMING
    seconds = read_json(path).get("seconds") if path.is_file() else None
    return float(seconds) if isinstance(seconds, int | float) else None


@contextmanager
def _timed(run: Path) -> Iterator[None]:
    """Add the time of the block to the run's. A process that is killed in it leaves a run of unknown time."""
    before = 0.0 if not (run / CONFIG).exists() else seconds_of(run)
    if before is not None and run.is_dir():
        replace_file(run / TIMING, json.dumps({"seconds": None}) + "\n")
    start = time.monotonic()
    try:
        yield
    finally:
        if run.is_dir() and before is not None:
            seconds = before + time.monotonic() - start
            replace_file(run / TIMING, json.dumps({"seconds": seconds}) + "\n")


def _release_memory(device: torch.device) -> None:
    """Give back what the last run held, which the check of the next one would count as taken."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _text_of(config: TrainConfig) -> object:
    """What its rows depend on: the seed divides a text that has no held-out part of its own."""
    return config.model.path, config.data, config.seed


def _check_begun(config: TrainConfig) -> None:
    """A ValueError if `config.out` holds a run with other options, or something else that is no directory."""
    if not begun_run(config):
        check_unused(config.out)
        return
    stored = read_config(config.out)
    check_changes(stored, config, config.out)
    if stored.steps != config.steps:
        raise ValueError(f"steps: expected the {stored.steps} that {config.out} was begun with, got {config.steps}")
