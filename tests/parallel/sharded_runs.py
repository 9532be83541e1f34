"""Runs with a tiny language model, to be trained on any number of ranks."""

import time
from pathlib import Path
from typing import Any

import torch
from clts import language_model
from sharded_steps import with_random_weights
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
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.language_model.over_ranks import held_here
from sparseclt.model.activations import Activations
from sparseclt.storage.checkpoint import latest
from sparseclt.storage.parts import Part
from sparseclt.training.trainer import Trainer
from sparseclt.training.update import add_up

ROWS = tokens(rows=30, length=12)


def config(out: Path, parallel: dict[str, int] | None = None, **changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "steps": 6, "batch_rows": 4, "checkpoints": CheckpointConfig(every_steps=3),
        "connections": ConnectionConfig(per_latent=5, start_per_latent=9, refresh_steps=2),
        "optimizer": OptimizerConfig(dead_after_tokens=60), "clt": CLTConfig(latents=24, active=3),
        "loss": LossConfig(sparse_start_share=0.0),
    }  # fmt: skip
    return TrainConfig(
        out=str(out), logging=LoggingConfig(every_steps=1, progress=False), data=DataConfig(row_tokens=12),
        parallel=ParallelConfig(**(parallel or {})), **(values | changes),
    )  # fmt: skip


def trainer(out: Path, parallel: dict[str, int] | None = None, **changes: Any) -> Trainer:
    return Trainer(config(out, parallel, **changes), language_model=language_model("gpt2", torch.float32), rows=ROWS)


def fit(out: Path, parallel: dict[str, int] | None = None, resume: bool = False, **changes: Any) -> None:
    trainer(out, parallel, **changes).fit(resume=out if resume else None)


def fit_in_bf16(out: Path, parallel: dict[str, int]) -> None:
    """A run in which everything is in half precision that may be."""
    changes = config(
        out, parallel, clt=CLTConfig(latents=24, active=3, dtype="bf16"),
        optimizer=OptimizerConfig(dead_after_tokens=60, state="8bit", rows="touched"),
    )  # fmt: skip
    Trainer(changes, language_model=language_model("gpt2", torch.bfloat16), rows=ROWS).fit()


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


def batches(parallel: dict[str, int], changes: dict[str, Any], first: int = 0) -> dict[str, Any]:
    """What this rank is given for each step from the `first` on."""
    t = trainer(Path("nowhere"), parallel, **changes)
    found = [(a.tokens.clone(), a.x[1].clone(), a.counted.clone()) for a in t.batches.from_step(first)]
    return {"batches": found, "place": (t.ranks.data.rank, t.ranks.latents.rank)}


def captured_ahead(parallel: dict[str, int]) -> int:
    """How many batches this rank captures while the first one is in use."""
    t = trainer(Path("nowhere"), parallel)
    captured: list[int] = []
    if (model := held_here(t.language_model)) is not None:
        capture = model.capture

        def counted(tokens: torch.Tensor, *, attention: bool = False) -> Activations:
            captured.append(len(tokens))
            return capture(tokens, attention=attention)

        model.capture = counted
    batches = t.batches.from_step(0)
    next(batches)
    end = time.monotonic() + 20
    while model is not None and len(captured) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    while_in_use = len(captured)
    assert len(list(batches)) == 5
    return while_in_use


def models_loaded(parallel: dict[str, int]) -> dict[str, Any]:
    """How many language models this process loads for a trainer."""
    loaded: list[Any] = []

    def load(config: TrainConfig) -> LanguageModel:
        loaded.append(config.device)
        return language_model("gpt2", torch.float32)

    of, LanguageModel.of = LanguageModel.of, load
    try:
        t = Trainer(config(Path("nowhere"), parallel), rows=ROWS)
    finally:
        LanguageModel.of = of
    return {"loaded": len(loaded), "place": (t.ranks.data.rank, t.ranks.latents.rank), "digest": t.identity.model}


def replaced_gradients(attention: str, parallel: dict[str, int]) -> dict[str, Any]:
    """Loss terms and gradients of one batch, with the cross-entropy of the replaced model, in float64."""
    changes = config(
        Path("nowhere"), parallel, clt=CLTConfig(latents=24, active=3, attention=attention),
        connections=ConnectionConfig(per_latent=4), loss=LossConfig(sparse_start_share=0.0, cross_entropy_weight=0.5),
    )  # fmt: skip
    t = Trainer(changes, language_model=language_model("gpt2", torch.float64), rows=ROWS)
    t.clt.double()
    with_random_weights(t)
    found = t.objective.backward(next(iter(t.batches.from_step(0))), 0.7, check=lambda total, terms: None)
    add_up(t.clt)
    found.gradients.add_to_encoders()
    grads = {
        f"{module.site.name}/{name}": getattr(module, name).grad
        for module in t.clt for name in ("W_enc", "b_enc", "b_dec")
    }  # fmt: skip
    for index, module in enumerate(t.clt):
        grads[f"{module.site.name}/W_dec"] = torch.cat([chunk.gradient for chunk in found.gradients.chunks(index)])
    terms = {name: float(value) for name, value in found.terms.items()}
    return {"grads": grads, "terms": terms, "place": (t.ranks.data.rank, t.ranks.latents.rank)}


__all__ = [
    "batches",
    "captured_ahead",
    "evaluated",
    "fit",
    "fit_in_bf16",
    "latest",
    "loaded",
    "models_loaded",
    "replaced_gradients",
    "save_again",
    "trainer",
]
