"""Checkpoints of a few numbers, each full of its own mark, so that a mixture would be noticed."""

from pathlib import Path

import torch

from sparseclt.storage.checkpoint import latest, load_state, prune, save_state
from sparseclt.storage.clt_files import load_clt, save_clt
from sparseclt.storage.directories import atomic_directory


def write(run: Path, step: int, mark: int) -> None:
    shapes = {"W_enc": (2, 3), "b_enc": (2,), "W_dec": (2, 1, 3), "b_dec": (3,)}
    weights = {f"mlp.0.{name}": torch.full(shape, float(mark)) for name, shape in shapes.items()}
    with atomic_directory(run / "checkpoints" / f"step_{step:08d}") as directory:
        save_clt(directory, {"model_name": "tiny", "mark": mark}, weights)
        save_state(directory, {"moment": torch.full((2,), float(mark))}, {"mark": mark})


def save(run: Path, step: int, mark: int) -> None:
    """What a trainer does every so often: a checkpoint is written, and all but the newest are removed."""
    write(run, step, mark)
    prune(run, keep=1)


def mark(run: Path) -> int | None:
    """Whose checkpoint the newest is, after all of its files agreed; None: there is none."""
    path = latest(run)
    if path is None:
        return None
    (config, weights), (tensors, numbers) = load_clt(path), load_state(path)
    marks = {
        config["mark"],
        numbers["mark"],
        *(int(x) for t in (*weights.values(), *tensors.values()) for x in t.view(-1)),
    }
    assert len(marks) == 1
    return int(marks.pop())
