"""What an experiment is: a question, the runs that answer it, the columns of its table."""

import shlex
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO

import tyro

from sparseclt.config import TrainConfig
from sparseclt.config.strict import ConfigError


@dataclass(frozen=True)
class Variant:
    """One row of an experiment's table: a run, trained once per seed."""

    label: str
    """Its name in tables, and that of its directory."""
    options: str = ""
    """What it changes, as options of `sparseclt train`."""
    vanilla: str | None = None
    """The variant whose vanilla FVU its excess is measured against (column `excess_over_vanilla`)."""
    unconnected: str | None = None
    """The variant with C = 0 which its connections are measured against (column `explained`)."""

    def of(self, base: TrainConfig) -> TrainConfig:
        """`base` with the variant's options. Raises ConfigError, naming the variant, where they do not go together."""
        return with_options(base, shlex.split(self.options), f"variant {self.label}")


@dataclass(frozen=True)
class Experiment:
    """A question, and the runs whose table answers it."""

    name: str
    question: str
    variants: tuple[Variant, ...]
    columns: tuple[str, ...]
    """Names of `columns.COLUMNS`."""
    base: str = ""
    """Options of `sparseclt train` for all variants, which those of the user and of the variants override."""

    def __post_init__(self) -> None:
        labels = [variant.label for variant in self.variants]
        references = {name for v in self.variants for name in (v.vanilla, v.unconnected) if name is not None}
        if len(set(labels)) < len(labels) or not references <= set(labels):
            raise ValueError(f"variants: expected labels, each once, and references among them, got {labels}")

    def config(self) -> TrainConfig:
        """The configuration that the user's options are applied to."""
        return with_options(TrainConfig(out=f"runs/experiments/{self.name}"), shlex.split(self.base), self.name)


def with_options(config: TrainConfig, options: Sequence[str], name: str) -> TrainConfig:
    """`config` with other values for `options`, given as to `sparseclt train`. Raises ConfigError, beginning with
    `name`, for values that make no sense together; ValueError for options that do not exist."""
    if not options:
        return config
    messages = StringIO()
    try:
        with redirect_stderr(messages):
            return tyro.cli(TrainConfig, args=list(options), default=config)
    except SystemExit as stop:
        if (error := refusal(stop)) is not None:
            raise ConfigError(f"{name}: {error}") from None
        raise ValueError(f"{name}: expected options of sparseclt train, got {shlex.join(options)}") from None


def refusal(stop: SystemExit) -> ConfigError | None:
    """The error of a configuration behind an exit of tyro's, which frames and wraps it; None if it is another one."""
    cause: BaseException | None = stop
    while cause is not None and not isinstance(cause, ConfigError):
        cause = cause.__context__
    return cause
