"""Latents that were dead at the end of training, by the trainer's own counters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparseclt.connections.activity import HORIZON
from sparseclt.evaluation.metrics import Evaluation, mean_over_modules
from sparseclt.evaluation.statistics import TRAINING_TOKENS
from sparseclt.model.sites import MODES
from sparseclt.storage.checkpoint import load_state


def with_dead_in_training(evaluation: Evaluation, checkpoint: str | Path) -> Evaluation:
    """`evaluation` with the share of latents that fired on none of the last 1,000,000 training tokens, by the counters
    in directory `checkpoint` of the run; as it was, of a mode that was trained on fewer."""
    tensors, _ = load_state(checkpoint)
    shares: list[dict[str, Any]] = [{} for _ in evaluation.modules]
    for mode in MODES:
        if f"activity/{mode}/weight" not in tensors:
            continue
        seen = -HORIZON * torch.log2(1 - tensors[f"activity/{mode}/weight"]).item()
        if seen < TRAINING_TOKENS * (1 - 1e-6):  # rounding
            continue
        dead = tensors[f"activity/{mode}/tokens_since_fired"] >= TRAINING_TOKENS
        for share, module in zip(shares, dead, strict=True):
            share[f"dead_in_training_{mode}"] = module.double().mean().item()
    modules = tuple(replace(module, **share) for module, share in zip(evaluation.modules, shares, strict=True))
    return replace(evaluation, modules=modules, mean=mean_over_modules(modules))
