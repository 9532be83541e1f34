"""The configuration of a training run: frozen dataclasses that refuse values which make no sense.

Every field is checked when a dataclass is built, whether in Python, by `dataclasses.replace`, from JSON or by the
command, whose help shows the text below each field.
"""

from sparseclt.config.groups import (
    ActivationConfig,
    Budget,
    CheckpointConfig,
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    DataConfig,
    Importance,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
)
from sparseclt.config.parallel import ParallelConfig
from sparseclt.config.run import TrainConfig, from_dict, to_dict

__all__ = [
    "ActivationConfig",
    "CLTConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "ConnectionConfig",
    "DataConfig",
    "Budget",
    "Importance",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "TrainConfig",
    "from_dict",
    "to_dict",
]
