"""Training: both modes from one activation capture, checkpoints that continue bit-exactly."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparseclt.config import ModelShape, TrainConfig, from_dict, to_dict
from sparseclt.connections.activity import Activity, RecentLatents
from sparseclt.connections.policies import make_policy
from sparseclt.data.activation_cache import open_cache
from sparseclt.data.activation_stream import block_batches, shuffled
from sparseclt.data.prefetch import one_ahead
from sparseclt.data.text import RowStream, load_rows
from sparseclt.devices import resolve
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import Architecture, SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.pretrained import load_clt_tensors, write_clt
from sparseclt.model.sites import MODES, Mode
from sparseclt.storage import checkpoint
from sparseclt.training import memory
from sparseclt.training.loggers import JsonLinesLogger, make_loggers, truncate_after
from sparseclt.training.objective import Objective, Outcome
from sparseclt.training.optimizer import RowAdam, apply

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NonFiniteError(ValueError):
    """NaN or Inf in activations, loss or gradients; raised before the optimiser's step."""


def build_clt(config: TrainConfig, language_model: LanguageModel) -> SparseCLT:
    """The untrained CLT of `config` for `language_model`; the same for the same seed."""
    info = language_model.info
    architecture = Architecture(
        layers=info.n_layers, d_model=info.d_model, latents=config.clt.latents, active=config.clt.active,
        attention=config.clt.attention, parallel=info.parallel, centred=info.centred, model_name=info.name,
    )  # fmt: skip
    attention = None
    if config.clt.attention == "latents":
        attention = [language_model.attention_weights(layer) for layer in range(info.n_layers)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        clt = SparseCLT(architecture, attention)
    return clt.to(DTYPES[config.clt.dtype])


class Trainer:
    """Trains a `SparseCLT` as `config` says.

        Trainer(TrainConfig(out="runs/first")).fit()

    `language_model` and `rows` ([R, S] token ids) may be given instead of what `config` names. A cache of activations
    (`config.activations.cache`) that is absent or incomplete is written here.
    """

    def __init__(self, config: TrainConfig, *, language_model: LanguageModel | None = None, rows: Tensor | None = None):
        self.config, self.out = config, Path(config.out)
        self.device = resolve(config.device)
        self.language_model = language_model or LanguageModel.load(
            config.model.path, layers=config.model.layers, device=str(self.device)
        )
        context = self.language_model.info.context
        if context and config.data.row_tokens > context:
            raise ValueError(
                f"data.row_tokens: expected at most the model's context of {context}, got {config.data.row_tokens}"
            )
        info = self.language_model.info  # which is in memory already
        self.shape = ModelShape(info.n_layers, info.d_model, info.n_heads, parallel=info.parallel)
        memory.check_fits(config, self.shape, memory.available_bytes(self.device))
        if rows is None:
            rows = load_rows(config, self.language_model.tokenizer, "train")
        self.stream = RowStream(rows, config.batch_rows, config.seed)
        self.clt = build_clt(config, self.language_model).to(self.device)
        self.policy = make_policy(config.connections, self.clt, config.steps, config.compute.backend)
        if self.policy:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed + 1)
                self.policy.prepare(self.clt)
        M = len(self.clt.sites)
        self.activity: dict[Mode, Activity] = {
            mode: Activity(M, config.clt.latents, device=self.device) for mode in MODES
        }
        if self.policy and config.connections.importance == "coactivation":
            recent = RecentLatents(M, config.clt.active, config.connections.recent_tokens, self.device)
            self.activity["vanilla"].recent = recent
        self.optimizer = RowAdam(self.clt, config.optimizer, config.seed)
        self.objective = Objective(config, self.clt, self.policy, self.activity, self.language_model)
        self.step = 0
        self.cache = open_cache(config, self.language_model, rows) if config.activations.cache is not None else None

    # One step

    def learning_rate(self, step: int) -> float:
        o, steps = self.config.optimizer, self.config.steps
        rise = (step + 1) / max(1.0, o.warmup_share * steps)
        fall = (steps - step) / max(1.0, o.decay_share * steps)
        return o.learning_rate * min(1.0, rise, fall)

    def ramp(self, step: int) -> float:
        """rho: the weight of the sparsely-connected terms."""
        c, steps = self.config.loss, self.config.steps
        return min(1.0, max(0.0, step - c.sparse_start_share * steps) / max(1.0, c.sparse_ramp_share * steps))

    def loss(
        self, activations: Activations, step: int, gradients: DecoderGradients | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[Mode, Outcome]]:
        """The loss of a batch, its terms by name, and each mode's pass. `gradients` gathers the decoders' gradient in
        place of their `.grad`."""
        outcomes = self.objective.outcomes(activations, gradients)
        terms = self.objective.terms(outcomes, activations, self.objective.means(activations))
        total, values = self.objective.loss(terms, activations.tokens.numel(), self.ramp(step))
        return total, values, outcomes

    def capture(self, tokens: Tensor) -> Activations:
        """The model's activations on `tokens` [B, S]: the one run of the model that both modes share."""
        return self.language_model.capture(tokens.to(self.device), attention=self.config.clt.attention == "latents")

    def _read(self, chosen: Tensor) -> Activations:
        """The activations of rows `chosen` [B] of the text: from the cache, or captured where there is none."""
        if self.cache:
            return self.cache.read(chosen, self.device)
        return self.capture(self.stream.rows[chosen])

    def _batches(self) -> Iterator[Activations]:
        """Batches for the steps that are left, one ahead unless the loss and the capture would both run the model."""
        steps, shuffle_bytes = range(self.step, self.config.steps), self.config.activations.shuffle_bytes
        if shuffle_bytes:
            info, rows = self.language_model.info, self.stream.rows
            size = block_batches(shuffle_bytes, self.config.batch_rows * rows.shape[1], info.n_layers, info.d_model)
            batches = shuffled(self._read, self.stream, steps, size)
        else:
            batches = (self._read(self.stream.take()) for _ in steps)
        return batches if self.config.loss.cross_entropy_weight and not self.cache else one_ahead(batches)

    def train_step(self, activations: Activations) -> dict[str, float]:
        """One optimiser step on a captured batch; returns the loss terms and counters as numbers.

        Raises NonFiniteError for NaN or Inf, and `memory.OutOfMemory`, before weights change where the backward pass
        ran out of memory in micro-batches of half as many rows, too.
        """
        with self._explaining_out_of_memory():
            self._check_activations(activations)
            if self.policy and self.step >= self.config.loss.sparse_start_share * self.config.steps:
                self.policy.update(self.clt, self.activity["vanilla"], self.step)
            backward = self.objective.backward(activations, self.ramp(self.step), self._check_loss)
            rate, clip = self.learning_rate(self.step), self.config.optimizer.clip_norm
            norm, spoiled = apply(self.clt, backward.gradients, self.optimizer, rate, clip)
        if spoiled is not None:
            raise NonFiniteError(
                f"step {self.step}: the gradient of {spoiled} is not finite; stopped before the optimiser's step"
            )
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

    def _check_loss(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        if not torch.isfinite(total):
            bad = next((name for name, term in terms.items() if not torch.isfinite(term)), "loss")
            raise NonFiniteError(f"step {self.step}: {bad} is {terms[bad].item()}; stopped before the optimiser's step")

    def _check_activations(self, activations: Activations) -> None:
        for name in ("x", "mlp_out", "attn_out"):
            for layer, tensor in enumerate(getattr(activations, name)):
                if not torch.isfinite(tensor).all():
                    raise NonFiniteError(
                        f"step {self.step}: the model's {name} of layer {layer} has NaN or Inf; "
                        "stopped before the optimiser's step"
                    )

    def _metrics(self, terms: dict[str, Tensor], norm: Tensor) -> dict[str, float]:
        metrics = {name: term.item() for name, term in terms.items()}
        metrics["gradient_norm"] = norm.item()
        metrics["tokens"] = self.step * self.config.batch_rows * self.stream.rows.shape[1]
        for mode in MODES:
            values = [v for name, v in metrics.items() if name.startswith(f"fvu_{mode}/")]
            if values:
                metrics[f"fvu_{mode}"] = sum(values) / len(values)
                dead = self.activity[mode].dead(self.config.loss.dead_after_tokens)
                metrics[f"dead_{mode}"] = dead.float().mean().item()
        return metrics

    # The run

    def fit(self, resume: str | Path | None = None) -> SparseCLT:
        """Train to the last step and return the CLT.

        `resume`: a run directory of the same configuration; training goes on from its newest whole checkpoint
        exactly as if it had never stopped. Without it the run directory must not hold a run yet.
        """
        from tqdm import tqdm

        if resume is not None:
            self.load(Path(resume))
        elif (self.out / "config.json").exists():
            raise ValueError(f"out: {self.out} already holds a run; choose another directory, or resume it")
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "config.json").write_text(json.dumps(to_dict(self.config), indent=2) + "\n")
        metrics_file = self.out / "metrics.jsonl"
        truncate_after(metrics_file, self.step)
        named = make_loggers(self.config.logging.loggers, self.out, to_dict(self.config))
        loggers = [JsonLinesLogger(metrics_file), *named]
        bar = tqdm(
            total=self.config.steps, initial=self.step, desc="training", unit="step",
            disable=not self.config.logging.progress,
        )  # fmt: skip
        try:
            with self._explaining_out_of_memory():
                for activations in self._batches():
                    metrics = self.train_step(activations)
                    bar.update()
                    last = self.step == self.config.steps
                    if last or self.step % self.config.logging.every_steps == 0:
                        for logger in loggers:
                            logger.log(self.step, metrics)
                        shown = {name: metrics[f"fvu_{name}"] for name in MODES if f"fvu_{name}" in metrics}
                        bar.set_postfix({f"FVU {name}": f"{value:.3f}" for name, value in shown.items()})
                    if last or self.step % self.config.checkpoints.every_steps == 0:
                        self.save()
        finally:
            bar.close()
            for logger in loggers:
                logger.close()
        self.clt.save_pretrained(self.out / "clt")
        return self.clt

    def save(self) -> Path:
        """Write checkpoints/step_N of the run directory, whole or not at all, and drop the oldest ones."""
        tensors: dict[str, Tensor] = {"random_state": torch.get_rng_state()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()}
        for mode, activity in self.activity.items():
            for key, value in activity.state().items():
                tensors[f"activity/{mode}/{key}"] = value
        numbers = {
            "step": self.step,
            "position": self.step * self.config.batch_rows,
            "micro_rows": self.objective.micro_rows,
        }
        folder = self.out / "checkpoints"
        with checkpoint.atomic_directory(folder / f"step_{self.step:08d}") as directory:
            write_clt(directory, self.clt)
            checkpoint.save_state(directory, tensors, numbers)
        for old in sorted(folder.glob("step_????????"))[: -self.config.checkpoints.keep]:
            shutil.rmtree(old)
        return folder / f"step_{self.step:08d}"

    def load(self, run: Path) -> None:
        """Take up the state of the newest whole checkpoint below `run`."""
        path = checkpoint.latest(run)
        if path is None:
            raise ValueError(f"resume: expected a run directory with a checkpoint, found none below {run}")
        saved = from_dict(json.loads((run / "config.json").read_text()))
        if _what_matters(saved) != _what_matters(self.config):
            raise ValueError(f"resume: the configuration differs from that of {run}; start from Trainer.from_run(run)")
        _, clt_state = checkpoint.load_clt(path)
        load_clt_tensors(self.clt, clt_state)
        tensors, numbers = checkpoint.load_state(path)
        for name, tensor in self.optimizer.tensors().items():
            tensor.copy_(tensors[f"optimizer/{name}"])
        for mode, activity in self.activity.items():
            for name, tensor in activity.state().items():
                tensor.copy_(tensors[f"activity/{mode}/{name}"])
        torch.set_rng_state(tensors["random_state"])
        self.step = self.optimizer.step = int(numbers["step"])
        self.objective.micro_rows = int(numbers.get("micro_rows", self.objective.micro_rows))
        self.stream = RowStream(
            self.stream.rows, self.config.batch_rows, self.config.seed, position=int(numbers["position"])
        )

    @classmethod
    def from_run(cls, run: str | Path) -> "Trainer":
        """A trainer with the configuration of run directory `run`, to resume or to repeat it."""
        return cls(read_config(run))


def _what_matters(config: TrainConfig) -> TrainConfig:
    """The configuration without what has no influence on the weights."""
    return replace(
        config, out="", device="", logging=replace(config.logging, loggers=(), progress=True),
        checkpoints=replace(config.checkpoints, keep=1),
    )  # fmt: skip


def read_config(run: str | Path) -> TrainConfig:
    """The configuration that a run directory was trained with."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise ValueError(f"run: expected a run directory with config.json, got {run}")
    return from_dict(json.loads(path.read_text()))
