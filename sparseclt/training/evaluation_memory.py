"""The memory that evaluating a CLT takes, and how many rows at a time fit."""

from sparseclt.config import TrainConfig
from sparseclt.costs import FLOAT, ID
from sparseclt.model.shape import ModelShape
from sparseclt.training.run_sizes import MemoryTerm, RunSizes, captured_bytes

MOST_ROWS = 16  # more are not faster


def evaluation_rows(config: TrainConfig, shape: ModelShape, available: int | None) -> int:
    """How many rows to evaluate at a time, from 1 to 16, so that what they need fits into `available` bytes beside what
    is there already (model, weights, connections). None: unknown, 16."""
    return _fitting_rows(RunSizes(config, shape), available)


def _fitting_rows(x: RunSizes, available: int | None) -> int:
    if available is None:
        return MOST_ROWS
    return max((rows for rows in range(1, MOST_ROWS + 1) if evaluation_bytes(x, rows) <= available), default=1)


def evaluation_terms(x: RunSizes, available: int | None) -> list[MemoryTerm]:
    """What evaluation holds beside the run's state, with as many rows at a time as fit into `available` bytes."""
    rows = _fitting_rows(x, available)
    formula = f"{rows} rows: v n (D (2 + 6 L) + V), 4 n D L, 24 n K M; or a module's decoders, 4 F D L"
    return [MemoryTerm("evaluation", evaluation_bytes(x, rows), ("evaluation",), formula)]


def evaluation_bytes(x: RunSizes, rows: int) -> int:
    """With so many rows at a time: their activations, and the largest of what follows on them."""
    n = rows * x.S
    widened = FLOAT * n * x.D * x.M if x.half else 0
    effective_decoders = FLOAT * x.F * x.D * max(x.readers, default=0) // x.ranks
    compared = x.w * x.F * x.D * x.widest // x.ranks  # decoders of unit length, in which twins are looked for
    return _captured(x, n) + widened + max(effective_decoders, compared, _replaced_run(x, n))


def _captured(x: RunSizes, n: int) -> int:
    return captured_bytes(x.config, x.shape, n)


def _replaced_run(x: RunSizes, n: int) -> int:
    """A run of the model with replaced outputs: its own activations, the pass that replaces them, and the largest part
    of the model itself, the logits where the vocabulary is large."""
    outputs = FLOAT * n * x.D * x.M
    # In sparsely-connected mode also the stream that each module reads; reconstructions in float32 are the activations.
    passed = outputs * (x.modes - 1 + x.half) + (FLOAT + ID) * n * x.active * x.modes
    in_attention, in_mlp = 4 * x.S * x.shape.heads, 3 * 4 * x.D  # scores and pattern; the hidden layer
    block = FLOAT * n * (max(in_attention, in_mlp) + 3 * x.D)
    logits = x.model_number * n * x.shape.vocab + (1 + x.half) * FLOAT * x.S * x.shape.vocab
    return _captured(x, n) + passed + max(block, logits)
