"""The formats by name: a new one is a line here, and its name in `sparseclt.export.FormatName`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparseclt.export import FormatName, circuit_tracer, neuronpedia
from sparseclt.formats import saelens, sparsify
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


def _weights_only(write: Callable[[SparseCLT, LanguageModel, Path], Path]) -> Writer:
    """`write` as a `Writer`: it needs neither text nor a name."""

    def writer(clt: SparseCLT, language_model: LanguageModel, rows: Tensor, name: str, path: Path) -> None:
        write(clt, language_model, path)

    return writer


FORMATS: dict[FormatName, Format] = {
    "circuit-tracer": Format(circuit_tracer.write, thresholds=True),
    "neuronpedia": Format(neuronpedia.write, thresholds=False),
    "saelens": Format(_weights_only(saelens.write), thresholds=True),
    "sparsify": Format(_weights_only(sparsify.write), thresholds=False),
}
