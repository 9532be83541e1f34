"""The files of a training run: its configuration, its metrics, its checkpoints."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseclt.config import TrainConfig, from_dict, to_dict
from sparseclt.connections.activity import Activity
from sparseclt.model import pretrained
from sparseclt.model.clt import SparseCLT
from sparseclt.model.sites import Mode
from sparseclt.storage import checkpoint, clt_files
from sparseclt.storage.directories import atomic_directory
from sparseclt.storage.json_files import read_json, replace_file
from sparseclt.strict import ConfigError
from sparseclt.training.optimizer import RowAdam

CONFIG, METRICS, CLT, CHECKPOINTS = "config.json", "metrics.jsonl", "clt", "checkpoints"


def read_config(run: str | Path) -> TrainConfig:
    """The configuration that a run directory was trained with."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise ValueError(f"run: expected a run directory with config.json, got {run}")
    try:
        return from_dict(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: " + f"\n{path}: ".join(str(error).splitlines())) from error


def write_config(run: Path, config: TrainConfig) -> None:
    """Write `config` into the run directory, which is made if it is not there."""
    run.mkdir(parents=True, exist_ok=True)
    replace_file(run / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")


def same_results(a: TrainConfig, b: TrainConfig) -> bool:
    """Whether two configurations differ in nothing that has an influence on the weights."""
    return _without_bystanders(a) == _without_bystanders(b)


def _without_bystanders(config: TrainConfig) -> dict[str, Any]:
    values = to_dict(config)
    del values["out"], values["device"]
    del values["logging"]["loggers"], values["logging"]["progress"], values["checkpoints"]["keep"]
    return values


def newest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint below `run`. Raises ValueError if there is none."""
    path = checkpoint.latest(run)
    if path is None:
        raise ValueError(f"resume: expected a run directory with a checkpoint, found none below {run}")
    return path


class TrainingState:
    """All that changes while a CLT is trained, to be written as a checkpoint and read back exactly."""

    def __init__(self, clt: SparseCLT, optimizer: RowAdam, activity: Mapping[Mode, Activity]):
        self.clt, self.optimizer, self.activity = clt, optimizer, activity

    def tensors(self) -> dict[str, Tensor]:
        """Everything beside the CLT, by name, to be saved or copied into."""
        tensors = {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()}
        for mode, activity in self.activity.items():
            tensors |= {f"activity/{mode}/{name}": tensor for name, tensor in activity.state().items()}
        return tensors

    def save(self, run: Path, step: int, micro_rows: int, keep: int) -> Path:
        """Write checkpoints/step_N of the run directory, whole or not at all, and keep only the `keep` newest ones."""
        folder = run / CHECKPOINTS
        folder.mkdir(exist_ok=True)  # without parents: a run directory that vanished is not made anew elsewhere
        path = folder / f"step_{step:08d}"
        with atomic_directory(path) as directory:
            pretrained.write(directory, self.clt)
            checkpoint.save_state(directory, self.tensors(), {"step": step, "micro_rows": micro_rows})
        checkpoint.prune(run, keep)
        return path

    def load(self, path: Path) -> tuple[int, int]:
        """Take up the checkpoint in directory `path`; returns its step and its rows in a micro-batch.

        Raises CheckpointError if it is damaged.
        """
        pretrained.load_tensors(self.clt, clt_files.load_clt(path)[1])
        saved, numbers = checkpoint.load_state(path)
        for name, tensor in self.tensors().items():
            saved.copy_into(name, tensor)
        self.optimizer.step = checkpoint.whole_number(path, numbers, "step", 0)
        return self.optimizer.step, checkpoint.whole_number(path, numbers, "micro_rows", 1)
