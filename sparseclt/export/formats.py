"""The formats by name: a new one is a line here, and its name in `sparseclt.export.FormatName`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparseclt.export import FormatName, circuit_tracer, neuronpedia
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT

# (clt, its language model, held-out rows [R, S], the name of the run, the new directory)
Writer = Callable[[SparseCLT, LanguageModel, Tensor, str, Path], None]


@dataclass(frozen=True)
class Format:
    """What a tool reads."""

    write: Writer
    """Writes the CLT into a directory, whole or not at all."""
    thresholds: bool
    """Whether the tool knows no TopK, so that a TopK CLT needs one threshold per latent there."""


FORMATS: dict[FormatName, Format] = {
    "circuit-tracer": Format(circuit_tracer.write, thresholds=True),
    "neuronpedia": Format(neuronpedia.write, thresholds=False),
}
