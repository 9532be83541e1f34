"""sparseclt: sparse kernels, and a trainer for sparsely-connected cross-layer transcoders.

`sparseclt.ops` needs only torch. The names below need the extra `train` and are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparseclt.extras import missing_extra

if TYPE_CHECKING:
    from sparseclt.config import (
        ActivationConfig,
        CheckpointConfig,
        CLTConfig,
        ComputeConfig,
        ConnectionConfig,
        DataConfig,
        LoggingConfig,
        LossConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        TrainConfig,
    )
    from sparseclt.connections.policies import LearnedConnections, TopConnections
    from sparseclt.evaluation.metrics import evaluate
    from sparseclt.graph.explain import prompt_graph
    from sparseclt.graph.intervention import Intervention, intervene
    from sparseclt.language_model.language_model import LanguageModel
    from sparseclt.model.clt import SparseCLT
    from sparseclt.model.shape import Architecture
    from sparseclt.training.trainer import Trainer

__all__ = [
    "ActivationConfig",
    "Architecture",
    "CLTConfig",
    "CheckpointConfig",
    "ComputeConfig",
    "ConnectionConfig",
    "DataConfig",
    "Intervention",
    "LanguageModel",
    "LearnedConnections",
    "LoggingConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "SparseCLT",
    "TopConnections",
    "TrainConfig",
    "Trainer",
    "evaluate",
    "intervene",
    "prompt_graph",
]
__version__ = "0.2.0"

_MODULES = {
    "ActivationConfig": "config",
    "CLTConfig": "config",
    "CheckpointConfig": "config",
    "ComputeConfig": "config",
    "ConnectionConfig": "config",
    "DataConfig": "config",
    "LoggingConfig": "config",
    "LossConfig": "config",
    "ModelConfig": "config",
    "OptimizerConfig": "config",
    "ParallelConfig": "config",
    "TrainConfig": "config",
    "LearnedConnections": "connections.policies",
    "TopConnections": "connections.policies",
    "evaluate": "evaluation.metrics",
    "prompt_graph": "graph.explain",
    "Intervention": "graph.intervention",
    "intervene": "graph.intervention",
    "LanguageModel": "language_model.language_model",
    "Architecture": "model.shape",
    "SparseCLT": "formats.registry",
    "Trainer": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'sparseclt' has no attribute {name!r}")
    try:
        module = import_module(f"sparseclt.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        raise missing_extra(f"sparseclt.{name}", error) from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
