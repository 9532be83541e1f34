"""A CLT in the formats of other tools."""

from typing import Literal

FormatName = Literal["circuit-tracer", "neuronpedia", "saelens", "sparsify"]
