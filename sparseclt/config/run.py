"""The whole configuration of a training run."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, field
from typing import Annotated, Any

from pydantic import AfterValidator

from sparseclt.config.groups import (
    ActivationConfig,
    CheckpointConfig,
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    Natural,
    OptimizerConfig,
    Positive,
    Text,
)
from sparseclt.config.parallel import ParallelConfig
from sparseclt.config.strict import device_name, from_json_values, strict


@strict()
class TrainConfig:
    """A training run: first the fields that every run sets, then groups, of which the later ones are for experts."""

    out: Text = "runs/default"
    """The run directory."""
    steps: Positive = 850
    """Training steps."""
    batch_rows: Positive = 4
    """Rows of text per step."""
    device: Annotated[str, AfterValidator(device_name)] = "auto"
    """'cpu', 'cuda', 'cuda:1', ... auto: CUDA if there is one, else the CPU."""
    seed: Natural = 0
    """Seed of the initial weights and of the order of the data."""
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        if problems := list(self._contradictions()):
            raise ValueError("\n".join(problems))

    def _contradictions(self) -> Iterator[str]:
        """Fields of different groups that do not go together."""
        a, c = self.activations, self.connections
        if self.clt.attention == "latents" and (a.shuffle_bytes or a.cache is not None):
            yield (
                f"activations.shuffle_bytes, activations.cache: expected 0 and None with clt.attention 'latents', "
                f"which needs the attention patterns of whole rows, got {a.shuffle_bytes} and {a.cache!r}"
            )
        if a.shuffle_bytes and self.loss.cross_entropy_weight:
            yield (
                f"activations.shuffle_bytes: expected 0 with loss.cross_entropy_weight > 0, for which the language "
                f"model runs on whole rows, got {a.shuffle_bytes}"
            )
        micro_rows = self.compute.micro_batch_rows
        if self.clt.activation == "batchtopk" and micro_rows is not None and micro_rows < self.batch_rows:
            yield (
                f"compute.micro_batch_rows: expected None with clt.activation 'batchtopk', which chooses the latents "
                f"of a whole batch at once, got {micro_rows}"
            )
        if self.compute.precision == "bf16" and self.clt.attention == "latents":
            yield (
                "compute.precision: expected 'fp32' or None with clt.attention 'latents', whose pre-activations are "
                "added up head after head, got 'bf16'"
            )
        if self.compute.precision == "fp32" and self.clt.dtype == "bf16":
            yield (
                "compute.precision: expected 'bf16' or None with clt.dtype 'bf16', in which products read the weights, "
                "got 'fp32'"
            )
        if c.policy == "learned" and c.candidates_after_steps >= self.steps:
            yield (
                f"connections.candidates_after_steps: expected less than steps = {self.steps} with connections.policy "
                f"'learned', which otherwise never connects anything, got {c.candidates_after_steps}"
            )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """The configuration as nested dicts, which JSON can hold."""
    return asdict(config)


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `to_dict` wrote, also after a round trip through JSON.

    Fields that are absent take their defaults. Raises ConfigError, a ValueError, for unknown fields and for every
    value that the constructors refuse, with one line per problem.
    """
    return from_json_values(TrainConfig, values)
