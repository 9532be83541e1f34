"""Training: both modes from one activation capture, checkpoints that continue bit-exactly."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.connections.activity import Activity, RecentLatents
from sparseclt.connections.policies import make_policy
from sparseclt.data.text import load_rows
from sparseclt.data.tokens import check_token_ids
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.sites import MODES, Mode
from sparseclt.storage.run_config import CLT, check_changes, check_unused, read_config
from sparseclt.training import finite, memory, revival, schedule, thresholds
from sparseclt.training.batches import Batches
from sparseclt.training.grid import available_to_rank, join
from sparseclt.training.interruption import Interrupted, StopRequest, stop_requests
from sparseclt.training.loggers import RunLog
from sparseclt.training.normalisation import normalise
from sparseclt.training.objective import ModePass, Objective
from sparseclt.training.optimizer import RowAdam
from sparseclt.training.precision import products
from sparseclt.training.run_directory import (
    Identity,
    TrainingState,
    check_identity,
    choose_checkpoint,
    newest_checkpoint,
    opened_run,
    set_later_aside,
)
from sparseclt.training.several_ranks import (
    agree_to_stop,
    decided,
    device_of,
    gradients_of_whole_batch,
    in_turn,
    language_model_of_ranks,
    of_whole_batch,
    on_ranks,
)
from sparseclt.training.untrained import build_clt
from sparseclt.training.update import clip_and_step
from sparseclt.training.warning_signs import WarningSigns


class Trainer:
    """Trains a `SparseCLT` as `config` says.

        Trainer(TrainConfig(out="runs/first")).fit()

    `language_model` and `rows` ([R, S] token ids) may be given instead of those that `config` names, and a `clt` that
    was trained already and is trained further in place. A cache of activations (`config.activations.cache`) that is
    absent or incomplete is written here.

    Where several processes were started (`config.parallel`), each makes a `Trainer` with the same arguments and calls
    its methods together with the others. Files are written once.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        language_model: LanguageModel | None = None,
        rows: Tensor | None = None,
        clt: SparseCLT | None = None,
    ):
        self.config, self.out = config, Path(config.out)
        self.ranks, self.device = join(config, language_model), device_of(config.device)
        self.language_model = language_model_of_ranks(config, self.ranks, self.device, language_model)
        context = self.language_model.shape.context
        if context and config.data.row_tokens > context:
            raise ValueError(
                f"data.row_tokens: expected at most the model's context of {context}, got {config.data.row_tokens}"
            )
        # The model itself is in memory already: available_bytes no longer counts its room as free.
        self.shape = replace(self.language_model.shape, parameters=0)
        memory.check_fits(on_ranks(config, self.ranks), self.shape, available_to_rank(self.device))
        if rows is None:
            with in_turn(self.ranks):
                rows = load_rows(config, self.language_model.tokenizer, "train")
        check_token_ids(rows, self.shape.vocab, self.language_model.tokenizer)
        self._untrained = clt is None
        if clt is not None and clt.ranks.world is not self.ranks.world:
            raise ValueError(
                "clt: expected None where several processes train together, got a CLT; resume its run instead"
            )
        self.clt = (clt or build_clt(config, self.language_model, self.ranks)).to(self.device)
        self.clt.products = products(config)
        self.policy = make_policy(config.connections, self.clt, config.steps, config.compute.backend)
        if self.policy and self._untrained:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed + 1)
                self.policy.prepare(self.clt)
        self.activity = self._make_activity()
        self._dead_after = revival.dead_after_tokens(config.optimizer, self.clt)
        self.optimizer = RowAdam(self.clt, config.optimizer, config.seed, self.ranks, config.compute.backend)
        self.objective = Objective(config, self.clt, self.policy, self.language_model)
        self.state = TrainingState(self.clt, self.optimizer, self.activity, self.policy)
        self.step = 0
        self._resumed = False  # or `load` took up a run
        self._has_clt = False  # or clt/ is that of the checkpoint taken up, if that is the last one
        self.batches = Batches(config, self.language_model, rows, self.device, self.ranks)

    def _make_activity(self) -> dict[Mode, Activity]:
        M, F, c = len(self.clt.sites), self.config.clt.latents, self.config.connections
        activity: dict[Mode, Activity] = {mode: Activity(M, F, device=self.device) for mode in MODES}
        if self.policy and c.importance == "coactivation":
            slots = self.clt.architecture.slots
            activity["vanilla"].recent = RecentLatents(self.clt.sites, slots, c.recent_tokens, self.device)
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
        total, values = objective.loss(terms, objective.tokens(activations), rho)
        return total, values, passes

    def train_step(self, activations: Activations) -> dict[str, float]:
        """One optimiser step on a captured batch; returns the loss terms and counters as numbers.

        Raises NonFiniteError for NaN or Inf, and `memory.OutOfMemory` if the backward pass runs out of memory even in
        micro-batches of half as many rows; in both cases before weights change.
        """
        config, step = self.config, self.step
        with self._explaining_out_of_memory():
            checks = finite.Checks(activations, step)
            if step == 0:
                finite.check_activations(activations, step)  # the first step measures them
                normalise(self.clt, self.optimizer, activations, self._untrained)
                if self._untrained:
                    thresholds.calibrate(self.clt, activations, config.compute.backend)
            if self.policy and schedule.connections_may_change(config, step):
                self.policy.update(self.clt, self.activity["vanilla"], step)
            rho = schedule.sparse_weight(config, step)
            backward = self.objective.backward(activations, rho, checks.note_loss)
            rate = schedule.learning_rate(config, step)
            norm, spoiled = clip_and_step(
                self.clt, backward.gradients, self.optimizer, rate, config.optimizer.clip_norm, checks.settle
            )
        finite.check_gradient(spoiled, step)
        data = self.ranks.data
        latents = {mode: of_whole_batch(found, data) for mode, found in backward.latents.items()}
        for mode, found in latents.items():
            self.activity[mode].observe(found, activations, data)
        if self.policy and backward.of_latents and rho:
            gradients = gradients_of_whole_batch([g / rho for g in backward.of_latents], self.ranks)
            self.policy.observe(latents["sparse"], gradients, activations, data)
        thresholds.follow(self.clt, latents)
        dead = {mode: self.activity[mode].dead(self._dead_after) for mode in latents}
        revival.raise_biases(self.clt, revival.to_revive(dead, self.clt.sites), revival.amount(config.optimizer))
        self.step += 1
        counts = {}
        if config.clt.activation != "topk":
            counts = thresholds.metrics(self.clt, latents, self.objective.tokens(activations))
        return self._metrics(backward.terms | counts, norm, dead)

    @contextmanager
    def _explaining_out_of_memory(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            compute = replace(self.config.compute, micro_batch_rows=self.objective.micro_rows)
            config = on_ranks(replace(self.config, compute=compute), self.ranks)
            raise memory.OutOfMemory(f"step {self.step}: {memory.explain(config, self.shape)}") from error

    def _metrics(self, terms: dict[str, Tensor], norm: Tensor, dead: dict[Mode, Tensor]) -> dict[str, float]:
        # All numbers at once: each by itself would wait for the device.
        named = terms | {"gradient_norm": norm} | {f"dead_{mode}": d.to(norm).mean() for mode, d in dead.items()}
        metrics: dict[str, float] = dict(zip(named, torch.stack([*named.values()]).tolist(), strict=True))
        metrics["tokens"] = self.step * self.batches.tokens
        for mode in dead:
            values = [v for name, v in metrics.items() if name.startswith(f"fvu_{mode}/")]
            metrics[f"fvu_{mode}"] = sum(values) / len(values)
        return metrics

    @cached_property
    def identity(self) -> Identity:
        """What this trainer trains on."""
        return Identity.of(self.language_model, self.batches.rows)

    def fit(self, resume: str | Path | None = None, *, checkpoint: str | Path | None = None) -> SparseCLT:
        """Train to the last step and return the CLT.

        `resume`: a run directory, wherever it lies; training goes on there from its newest whole checkpoint, or from
        `checkpoint`, exactly as if it had never stopped. Without it, and without `load`, the run directory must not
        hold a run yet.

        SIGINT and SIGTERM finish the step and write a checkpoint; then `Interrupted` is raised. An error before the
        first step is done leaves no directory behind.
        """
        if resume is not None:
            self.load(Path(resume), checkpoint)
        elif not self._resumed:
            check_unused(self.out)
        finished = self.step == self.config.steps
        with ExitStack() as stack:
            log = None
            if self.ranks.first:
                begun = lambda: self.step > 0  # noqa: E731
                log = stack.enter_context(opened_run(self.out, self.config, self.identity, self.step, begun))
            with self._explaining_out_of_memory(), stop_requests() as request:
                self._train(log, request)
            if finished and not self._has_clt:
                self.clt.save_pretrained(self.out / CLT)
        return self.clt.eval()

    def _train(self, log: RunLog | None, request: StopRequest) -> None:
        """The steps that are left, and their checkpoints."""
        self.clt.train()
        c, saved_at, signs = self.config.checkpoints, time.monotonic(), WarningSigns(self.config)
        for activations in self.batches.from_step(self.step):
            metrics = self.train_step(activations)
            if log is not None:
                log.step(self.step, metrics)
                signs.look(self.step, metrics)
            late = c.every_minutes is not None and time.monotonic() - saved_at >= 60 * c.every_minutes
            late = agree_to_stop(self.ranks, request, late)
            last = self.step == self.config.steps
            if last:  # before the checkpoint: where there is one of the last step, clt/ is finished
                self.clt.save_pretrained(self.out / CLT)
            if last or late or request.signal or self.step % c.every_steps == 0:
                self.save()
                saved_at = time.monotonic()
            if request.signal:
                raise Interrupted(
                    f"{request.signal.name} after step {self.step} of {self.config.steps}, which is saved; "
                    f"sparseclt resume {self.out} goes on from there",
                    request.signal,
                )

    def save(self) -> Path:
        """Write checkpoints/step_N of the run directory, whole or not at all, and drop the oldest ones."""
        keep = self.config.checkpoints.keep
        return self.state.save(self.out, self.step, self.objective.micro_rows, self.identity, keep)

    def load(self, run: Path, checkpoint: str | Path | None = None) -> None:
        """Take up the run in directory `run` where its newest whole checkpoint, or `checkpoint`, stands; at step 0 if
        it has none yet.

        Raises ValueError, naming the option, for a configuration, model, tokenizer or text with which other weights
        would come out.
        """
        stored = read_config(run)
        check_changes(stored, self.config, run)
        self.config, self.out, self._resumed = replace(self.config, out=str(run)), run, True
        path = decided(
            self.ranks, lambda: newest_checkpoint(run) if checkpoint is None else choose_checkpoint(run, checkpoint)
        )
        if path is None:
            check_identity(run, self.identity)
            return
        step, micro_rows = self.state.load(path, self.identity)
        if step > self.config.steps:
            raise ValueError(f"steps: expected at least the {step} that {path} has done, got {self.config.steps}")
        if self.ranks.first:
            set_later_aside(path)
        self.step, self._has_clt = step, checkpoint is None and (run / CLT).is_dir()
        if self.config.compute.micro_batch_rows == stored.compute.micro_batch_rows:
            self.objective.micro_rows = micro_rows  # fewer, if memory ran out

    @classmethod
    def from_run(cls, run: str | Path, **changes: Any) -> "Trainer":
        """A trainer with the configuration of run directory `run`, for `fit(resume=run)`.

        `changes`: fields of `TrainConfig` that are to have other values, such as `steps` or `device`.
        """
        return cls(replace(read_config(run), **{"out": str(run), **changes}))
