"""The configuration of a training run: frozen dataclasses whose field comments are the command line's help."""

from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_type_hints

Importance = Literal["coactivation", "mean", "rms"]


@dataclass(frozen=True)
class ModelConfig:
    """The language model whose MLPs are replaced."""

    path: str = "embedded"
    """'embedded' (the small model that is shipped), a local directory, a GGUF file, or a hub name."""
    layers: int | None = None
    """Cover the first so many layers only; None: all."""


@dataclass(frozen=True)
class DataConfig:
    """The text that the CLT is trained and evaluated on."""

    source: str = "embedded"
    """'embedded', a local .txt, .jsonl or directory of them, or hf:NAME[:CONFIG] for a `datasets` data set."""
    text_field: str = "text"
    """The field that holds the text in JSON lines or a data set."""
    row_tokens: int = 128
    """Tokens in a row."""
    max_tokens: int | None = None
    """Stop reading text after so many tokens."""
    held_out_tokens: int = 65_536
    """Tokens for evaluation."""
    held_out_share: float = 0.05
    """Share of the rows held out where the source has no held-out split of its own."""


@dataclass(frozen=True)
class CLTConfig:
    """The shape of the transcoder."""

    latents: int = 512
    """Latents in each module (F)."""
    active: int = 16
    """Active latents for each token and module (K)."""
    attention: Literal["frozen", "latents"] = "frozen"
    """What stands for attention: the model's real attention outputs, or latents of their own."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the weights. bf16: half the memory; updates are rounded stochastically."""


@dataclass(frozen=True)
class ConnectionConfig:
    """Which upstream latents each latent may read in sparsely-connected mode."""

    policy: Literal["top", "learned", "dense-learned", "none"] = "top"
    """top: the C most important. learned: a logit for each of C candidates. dense-learned: a logit for every
    pair (small models; the original experiment). none: vanilla mode only."""
    per_latent: int = 32
    """Connections kept for each latent (C); with policy learned, candidates."""
    start_per_latent: int | None = None
    """Connections at the start, from where C falls geometrically. None: per_latent, throughout."""
    anneal_share: float = 0.5
    """Share of the steps over which C falls."""
    refresh_steps: int = 50
    """Steps between two choices of connections, with policy top."""
    candidates_after_steps: int = 50
    """With policy learned, steps before the candidates are chosen."""
    freeze_after_share: float = 1.0
    """Share of the steps after which the connections stay as they are."""
    importance: Importance = "coactivation"
    """The s of an upstream latent in its importance |V| x s: its mean over the tokens on which the reading latent
    fires, its mean over all tokens, or its root mean square."""
    recent_tokens: int = 16_384
    """Tokens over which co-activation is counted."""
    pressure_weight: float = 1e-3
    """Weight of the learned policies' pressure, for each connection that a latent is expected to keep open."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms."""

    sparse_start_share: float = 0.2
    """Share of the steps in vanilla mode alone, before connections are first chosen."""
    sparse_ramp_share: float = 0.2
    """Share of the steps over which, from then on, the sparsely-connected terms grow to full weight."""
    latent_agreement_weight: float = 0.2
    """Weight of the FVU of sparsely-connected latents against vanilla ones."""
    aux_weight: float = 1 / 32
    """Weight of AuxK, for latents dead in either mode."""
    aux_latents: int = 64
    """Dead latents that AuxK lets speak for each token."""
    dead_after_tokens: int = 3_000
    """Tokens without firing after which a latent counts as dead."""
    cross_entropy_weight: float = 0.0
    """Weight of the next-token cross-entropy of the replaced model, in each mode."""


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, with a linear warm-up and a linear decay to zero."""

    learning_rate: float = 2e-3
    """Peak learning rate."""
    warmup_share: float = 0.02
    """Share of the steps in which it rises."""
    decay_share: float = 0.5
    """Share of the steps, at the end, in which it falls to zero."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's betas."""
    clip_norm: float | None = 1.0
    """Largest norm of the gradient; None: not clipped."""
    state: Literal["fp32", "8bit"] = "fp32"
    """Adam's moments. fp32: 8 bytes a parameter. 8bit: 2 bytes a parameter of encoders and decoders, and a scale for
    each of their vectors."""
    rows: Literal["all", "touched"] = "all"
    """Decoder rows that a step updates: all, or those alone that a latent or a connection touched; the others'
    moments decay later, when they are touched."""


@dataclass(frozen=True)
class ActivationConfig:
    """Where the activations come from, and in what order (docs/activations.md)."""

    shuffle_bytes: int = 0
    """Bytes of a buffer of activations whose tokens are shuffled; 0: none, a batch is whole rows of text."""
    cache: str | None = None
    """Directory for the activations of all training rows: written first if absent, then read in place of running the
    language model. None: the model runs in each step."""
    cache_dtype: Literal["bf16", "int8"] = "bf16"
    """Of the cache on disk. int8: half the bytes, with one scale for each token and vector."""


@dataclass(frozen=True)
class ComputeConfig:
    """How a step is computed; the gradient is the same."""

    micro_batch_rows: int | None = None
    """Rows that go forward and backward at a time; None: all, which takes one forward pass less. The gradient is that
    of the whole step either way."""
    backend: str | None = None
    """Backend of the ops by name; None: the best that is installed for the device (resumed runs need the same)."""


@dataclass(frozen=True)
class LoggingConfig:
    """What is written and shown while a run trains."""

    every_steps: int = 10
    """Steps between two lines of metrics.jsonl."""
    loggers: tuple[str, ...] = ()
    """Besides metrics.jsonl: wandb, trackio, tensorboard."""
    progress: bool = True
    """Show a progress bar."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When a checkpoint is written, and how many stay."""

    every_steps: int = 500
    """Steps between two checkpoints; the last step always makes one."""
    keep: int = 2
    """How many of the newest checkpoints stay on disk."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    out: str = "runs/default"
    """The run directory."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clt: CLTConfig = field(default_factory=CLTConfig)
    connections: ConnectionConfig = field(default_factory=ConnectionConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    activations: ActivationConfig = field(default_factory=ActivationConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    steps: int = 850
    """Training steps."""
    batch_rows: int = 4
    """Rows of text in a step."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    device: str = "auto"
    """'cpu', 'cuda', ...; auto: CUDA where there is one."""

    def __post_init__(self):
        _at_least(self, 1, "steps", "batch_rows")
        _at_least(self.logging, 1, "every_steps")
        _at_least(self.checkpoints, 1, "every_steps", "keep")
        if self.compute.micro_batch_rows is not None:
            _at_least(self.compute, 1, "micro_batch_rows")
        _at_least(self.data, 2, "row_tokens")
        _at_least(self.clt, 1, "latents", "active")
        _at_least(self.activations, 0, "shuffle_bytes")
        _share(self.connections, "anneal_share", "freeze_after_share")
        _share(self.loss, "sparse_start_share", "sparse_ramp_share")
        _share(self.optimizer, "warmup_share", "decay_share")
        if self.clt.dtype != "fp32" and self.clt.attention == "latents":
            raise ValueError(f"clt.dtype: expected 'fp32' with attention latents, got {self.clt.dtype!r}")
        if self.clt.active > self.clt.latents:
            raise ValueError(f"clt.active: expected at most clt.latents = {self.clt.latents}, got {self.clt.active}")
        a = self.activations
        if a.cache_dtype not in ("bf16", "int8"):
            raise ValueError(f"activations.cache_dtype: expected 'bf16' or 'int8', got {a.cache_dtype!r}")
        if self.clt.attention == "latents" and (a.shuffle_bytes or a.cache is not None):
            raise ValueError(
                f"activations.shuffle_bytes, activations.cache: expected 0 and None with clt.attention 'latents', "
                f"which needs the attention patterns of whole rows, got {a.shuffle_bytes} and {a.cache!r}"
            )
        if a.shuffle_bytes and self.loss.cross_entropy_weight:
            raise ValueError(
                f"activations.shuffle_bytes: expected 0 with loss.cross_entropy_weight > 0, for which the language "
                f"model runs on whole rows, got {a.shuffle_bytes}"
            )


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}: expected at least {least}, got {getattr(config, name)}")


def _share(config: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: expected a share between 0 and 1, got {getattr(config, name)}")


def to_dict(config: TrainConfig) -> dict[str, Any]:
    return asdict(config)


def from_dict(values: dict[str, Any], kind: type = TrainConfig, where: str = "") -> Any:
    """The configuration that `to_dict` wrote (also through JSON); a ValueError names an unknown field."""
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"config: unknown field {where}{unknown[0]}; expected one of {sorted(known)}")
    arguments = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            value = from_dict(value, hints[name], f"{where}{name}.")
        arguments[name] = tuple(value) if isinstance(value, list) else value
    return kind(**arguments)
