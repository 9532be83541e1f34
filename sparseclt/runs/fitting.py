"""Runs that are trained and evaluated: a new one, or one that goes on."""

from dataclasses import replace
from pathlib import Path

from sparseclt.config import TrainConfig
from sparseclt.evaluation.metrics import Evaluation
from sparseclt.runs.measurement import held_out_rows, measure
from sparseclt.storage.run_config import check_changes, check_trained, check_unused, read_config
from sparseclt.training.several_ranks import in_turn
from sparseclt.training.trainer import Trainer


def train(config: TrainConfig) -> Evaluation | None:
    """Train, evaluate on held-out text, write tables and plots; returns the evaluation, or None on all but the first of
    several ranks."""
    return finish(begin(config))


def begin(config: TrainConfig) -> Trainer:
    """A new run, in a directory that is free: `finish` trains it."""
    check_unused(config.out)
    return Trainer(config)


def resume(run: str | Path, config: TrainConfig | None = None, *, checkpoint: str | Path | None = None) -> Trainer:
    """The run in directory `run` at its newest whole checkpoint, or at `checkpoint`: `finish` goes on with it.

    `config`: its configuration, perhaps with more steps, another device, or other intervals for logs and checkpoints.
    Raises ValueError, naming the option, for a change that would train something else.
    """
    stored = read_config(run)
    check_trained(run)
    config = replace(config or stored, out=str(run))
    check_changes(stored, config, run)  # before anything is loaded
    trainer = Trainer(config)
    trainer.load(Path(run), checkpoint)
    return trainer


def finish(trainer: Trainer) -> Evaluation | None:
    """Train to the last step, evaluate on held-out text, write tables and plots; None on all but the first of several
    ranks."""
    model = trainer.language_model
    with in_turn(trainer.ranks):
        rows = held_out_rows(trainer.config, model)  # before the training: text that is missing is found at once
    result = measure(trainer.config, trainer.fit(), model, rows)
    return result if trainer.ranks.first else None
