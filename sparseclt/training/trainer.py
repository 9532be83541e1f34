"""Training: both modes from one activation capture, checkpoints that continue bit-exactly."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseclt.config import TrainConfig, to_dict
from sparseclt.connections.activity import Activity, RecentLatents
from sparseclt.connections.policies import make_policy
from sparseclt.data.text import load_rows
from sparseclt.devices import resolve
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.shape import Architecture
from sparseclt.model.sites import MODES, Mode
from sparseclt.training import finite, memory, schedule
from sparseclt.training.batches import Batches
from sparseclt.training.loggers import RunLog, truncate_after
from sparseclt.training.objective import ModePass, Objective
from sparseclt.training.optimizer import RowAdam, clip_and_step
from sparseclt.training.run_directory import (
    CLT,
    CONFIG,
    METRICS,
    TrainingState,
    newest_checkpoint,
    read_config,
    same_results,
    write_config,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_clt(config: TrainConfig, language_model: LanguageModel) -> SparseCLT:
    """The untrained CLT of `config` for `language_model`; the same for the same seed."""
    shape = language_model.shape
    architecture = Architecture(shape, config.clt.latents, config.clt.active, config.clt.attention)
    attention = None
    if config.clt.attention == "latents":
        attention = [language_model.attention_weights(layer) for layer in range(shape.layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clt = SparseCLT(architecture, attention)
    return clt.to(DTYPES[config.clt.dtype])


class Trainer:
    """Trains a `SparseCLT` as `config` says.

        Trainer(TrainConfig(out="runs/first")).fit()

    `language_model` and `rows` ([R, S] token ids) may be given instead of those that `config` names. A cache of
    activations (`config.activations.cache`) that is absent or incomplete is written here.
    """

    def __init__(self, config: TrainConfig, *, language_model: LanguageModel | None = None, rows: Tensor | None = None):
        self.config, self.out = config, Path(config.out)
        self.device = resolve(config.device)
        self.language_model = language_model or LanguageModel.load(
            config.model.path, layers=config.model.layers, device=str(self.device), dtype=config.model.dtype
        )
        context = self.language_model.shape.context
        if context and config.data.row_tokens > context:
            raise ValueError(
                f"data.row_tokens: expected at most the model's context of {context}, got {config.data.row_tokens}"
            )
        # The model itself is in memory already: available_bytes no longer counts its room as free.
        self.shape = replace(self.language_model.shape, parameters=0)
        memory.check_fits(config, self.shape, memory.available_bytes(self.device))
        if rows is None:
            rows = load_rows(config, self.language_model.tokenizer, "train")
        self.clt = build_clt(config, self.language_model).to(self.device)
        self.policy = make_policy(config.connections, self.clt, config.steps, config.compute.backend)
        if self.policy:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed + 1)
                self.policy.prepare(self.clt)
        self.activity = self._make_activity()
        self.optimizer = RowAdam(self.clt, config.optimizer, config.seed)
        self.objective = Objective(config, self.clt, self.policy, self.activity, self.language_model)
        self.state = TrainingState(self.clt, self.optimizer, self.activity)
        self.step = 0
        self.batches = Batches(config, self.language_model, rows, self.device)

    def _make_activity(self) -> dict[Mode, Activity]:
        M, F, c = len(self.clt.sites), self.config.clt.latents, self.config.connections
        activity: dict[Mode, Activity] = {mode: Activity(M, F, device=self.device) for mode in MODES}
        if self.policy and c.importance == "coactivation":
            activity["vanilla"].recent = RecentLatents(M, self.config.clt.active, c.recent_tokens, self.device)
        return activity

    def loss(
        self, activations: Activations, step: int, gradients: DecoderGradients | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[Mode, ModePass]]:
        """The loss of a batch, its terms by name, and each mode's pass. `gradients` collects the decoders' gradient
        instead of their `.grad`."""
        objective = self.objective
        passes = objective.passes(activations, gradients)
        terms = objective.terms(passes, activations, objective.means(activations))
        rho = schedule.sparse_weight(self.config, step)
        total, values = objective.loss(terms, activations.tokens.numel(), rho)
        return total, values, passes

    def train_step(self, activations: Activations) -> dict[str, float]:
        """One optimiser step on a captured batch; returns the loss terms and counters as numbers.

        Raises NonFiniteError for NaN or Inf, and `memory.OutOfMemory` if the backward pass runs out of memory even in
        micro-batches of half as many rows; in both cases before weights change.
        """
        config, step = self.config, self.step
        with self._explaining_out_of_memory():
            finite.check_activations(activations, step)
            if self.policy and schedule.connections_may_change(config, step):
                self.policy.update(self.clt, self.activity["vanilla"], step)
            rho = schedule.sparse_weight(config, step)
            backward = self.objective.backward(
                activations, rho, lambda total, terms: finite.check_loss(total, terms, step)
            )
            rate = schedule.learning_rate(config, step)
            norm, spoiled = clip_and_step(
                self.clt, backward.gradients, self.optimizer, rate, config.optimizer.clip_norm
            )
        finite.check_gradient(spoiled, step)
        for mode, latents in backward.latents.items():
            self.activity[mode].update(latents)
        self.step += 1
        return self._metrics(backward.terms, norm)

    @contextmanager
    def _explaining_out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            compute = replace(self.config.compute, micro_batch_rows=self.objective.micro_rows)
            config = replace(self.config, compute=compute)
            raise memory.OutOfMemory(f"step {self.step}: {memory.explain(config, self.shape)}") from error

    def _metrics(self, terms: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
        # All numbers at once: each by itself would wait for the device.
        named = terms | {"gradient_norm": norm}
        metrics: dict[str, float] = dict(zip(named, torch.stack([*named.values()]).tolist(), strict=True))
        metrics["tokens"] = self.step * self.batches.tokens
        for mode in MODES:
            values = [v for name, v in metrics.items() if name.startswith(f"fvu_{mode}/")]
            if values:
                metrics[f"fvu_{mode}"] = sum(values) / len(values)
                dead = self.activity[mode].dead(self.config.loss.dead_after_tokens)
                metrics[f"dead_{mode}"] = dead.float().mean().item()
        return metrics

    def fit(self, resume: str | Path | None = None) -> SparseCLT:
        """Train to the last step and return the CLT.

        `resume`: a run directory of the same configuration; training goes on from its newest whole checkpoint
        exactly as if it had never stopped. Without it the run directory must not hold a run yet.
        """
        if resume is not None:
            self.load(Path(resume))
        elif (self.out / CONFIG).exists():
            raise ValueError(f"out: {self.out} already holds a run; choose another directory, or resume it")
        write_config(self.out, self.config)
        truncate_after(self.out / METRICS, self.step)
        log = RunLog(self.config.logging, self.out, to_dict(self.config), self.config.steps, self.step)
        with closing(log), self._explaining_out_of_memory():
            for activations in self.batches.from_step(self.step):
                log.step(self.step + 1, self.train_step(activations))
                if self.step == self.config.steps or self.step % self.config.checkpoints.every_steps == 0:
                    self.save()
        self.clt.save_pretrained(self.out / CLT)
        return self.clt

    def save(self) -> Path:
        """Write checkpoints/step_N of the run directory, whole or not at all, and drop the oldest ones."""
        return self.state.save(self.out, self.step, self.objective.micro_rows, self.config.checkpoints.keep)

    def load(self, run: Path) -> None:
        """Take up the state of the newest whole checkpoint below `run`."""
        path = newest_checkpoint(run)
        if not same_results(read_config(run), self.config):
            raise ValueError(f"resume: the configuration differs from that of {run}; start from Trainer.from_run(run)")
        self.step, self.objective.micro_rows = self.state.load(path)

    @classmethod
    def from_run(cls, run: str | Path) -> "Trainer":
        """A trainer with the configuration of run directory `run`, to resume or to repeat it."""
        return cls(read_config(run))
