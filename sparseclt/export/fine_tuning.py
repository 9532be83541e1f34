"""A short training with thresholds, after which a CLT is as good with them as it was with TopK."""

import copy
from dataclasses import replace

from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.training.trainer import Trainer


def fine_tune(
    clt: SparseCLT, language_model: LanguageModel, config: TrainConfig, steps: int, rows: Tensor | None = None
) -> SparseCLT:
    """A copy of `clt`, one with thresholds, trained in both modes for `steps` steps on the text of `config`.

    With the losses of `config`; connections stay. Thresholds are trained as those of any JumpReLU CLT, with the term
    that holds L0 at K: were they fixed, a latent that drops below its threshold would never learn to fire again. The
    learning rate falls from the peak of `config` to zero. `rows` [R, S]: token ids, instead of the text of `config`.
    Raises ValueError for a CLT without thresholds and for steps below 1.
    """
    if clt.architecture.activation != "jumprelu":
        raise ValueError(f"clt: expected activation 'jumprelu', got {clt.architecture.activation!r}; calibrate it")
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    tuned = copy.deepcopy(clt)
    for module in tuned:
        if module.logits is not None:
            module.logits.requires_grad_(False)
    trainer = Trainer(_short(config, steps), language_model=language_model, rows=rows, clt=tuned)
    tuned.train()
    for activations in trainer.batches.from_step(0):
        trainer.train_step(activations)
    return tuned.requires_grad_(True).eval()


def _short(config: TrainConfig, steps: int) -> TrainConfig:
    """`config` for such a training: both modes from the first step, connections kept, no dead latents revived."""
    return replace(
        config,
        steps=steps,
        clt=replace(config.clt, activation="jumprelu"),
        activations=replace(config.activations, cache=None),
        connections=replace(
            config.connections,
            freeze_after_share=0.0,
            exchange_share=0.0,
            candidates_after_steps=0,
            open_per_latent=None,
            pressure_weight=0.0,
        ),  # fmt: skip
        loss=replace(config.loss, sparse_start_share=0.0, sparse_ramp_share=0.0),
        optimizer=replace(config.optimizer, decay_share=1.0, revival_rate=0.0),
    )
