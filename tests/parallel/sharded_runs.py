"""Runs with a tiny language model, to be trained on any number of ranks."""

from pathlib import Path
from typing import Any

import torch
from clts import language_model
from tiny_models import tokens

from sparseclt.config import (
    CheckpointConfig,
    CLTConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from sparseclt.evaluation.metrics import evaluate
from sparseclt.evaluation.pruning import fvu_against_c
from sparseclt.storage.checkpoint import latest
from sparseclt.storage.parts import Part
from sparseclt.training.trainer import Trainer

ROWS = tokens(rows=30, length=12)


def config(out: Path, parallel: dict[str, int] | None = None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 6, "batch_rows": 4, "checkpoints": CheckpointConfig(every_steps=3),
        "connections": ConnectionConfig(per_latent=5, start_per_latent=9, refresh_steps=2),
        "optimizer": OptimizerConfig(dead_after_tokens=60),
    }  # fmt: skip
    return TrainConfig(
        out=str(out), logging=LoggingConfig(every_steps=1, progress=False), clt=CLTConfig(latents=24, active=3),
        data=DataConfig(row_tokens=12), loss=LossConfig(sparse_start_share=0.0),
        parallel=ParallelConfig(**(parallel or {})), **(values | changes),
    )  # fmt: skip


def trainer(out: Path, parallel: dict[str, int] | None = None, **changes: Any) -> Trainer:
    return Trainer(config(out, parallel, **changes), language_model=language_model("gpt2", torch.float32), rows=ROWS)


def fit(out: Path, parallel: dict[str, int] | None = None, resume: bool = False, **changes: Any) -> None:
    trainer(out, parallel, **changes).fit(resume=out if resume else None)


def loaded(out: Path, parallel: dict[str, int] | None = None, **changes: Any) -> dict[str, Any]:
    """What this rank has of the newest checkpoint, and its place."""
    t = trainer(out, parallel, **changes)
    t.load(out)
    tensors = {name: t.own if isinstance(t, Part) else t for name, t in t.state.tensors().items()}
    tensors |= {f"clt/{name}": tensor for name, tensor in t.clt.state_dict().items()}
    return {"tensors": tensors, "place": (t.ranks.data.rank, t.ranks.latents.rank), "step": t.step}


def save_again(out: Path, copy: Path, parallel: dict[str, int]) -> None:
    """Take up the newest checkpoint and write it into another run directory."""
    t = trainer(out, parallel)
    t.load(out)
    if t.ranks.first:
        copy.mkdir(exist_ok=True)
    t.ranks.world.wait()
    t.state.save(copy, t.step, 4, t.identity, keep=2)


def evaluated(run: Path, parallel: dict[str, int]) -> dict[str, Any]:
    """The evaluation of a finished run, and its curve of FVU against C, from what ranks have of its CLT."""
    t = trainer(run, parallel)
    t.load(run)
    model, held_out = t.language_model, tokens(rows=6, length=12, seed=7)
    result = evaluate(t.clt, model, held_out, batch_rows=3).to_dict()
    result["curve"] = fvu_against_c(t.clt, model, held_out, [1, 4], batch_rows=3)
    return result


__all__ = ["evaluated", "fit", "latest", "loaded", "save_again", "trainer"]
