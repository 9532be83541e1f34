"""Costs by formula: the size of a CLT, its optimiser state, and the work and memory traffic of every op.

A library of plain functions that needs only the standard library. The memory plan (`sparseclt plan`), the rooflines
of the benchmarks and the tables of docs/kernels.md all count with it, so that they cannot disagree.

Letters: N tokens, D d_model, F latents, K active latents per token, C connections per latent, U upstream latents,
S active upstream latents per token, T target layers, L layers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

# Bytes of a float32, of an int64 id, and of an int32 position in an order that transposes slots.
FLOAT, ID, POSITION = 4, 8, 4
BYTES = {"fp32": FLOAT, "bf16": 2, "fp16": 2}  # of a number, by the configuration's names


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes moved.

    `used` counts an operand each time the formula uses it: a decoder row that two tokens gather counts twice. Operands
    of a matrix product count once, and so does its result, unless an op consumes it right away. `once` counts every
    operand and result once, as with an endless cache.
    """

    flops: float = 0.0
    used: float = 0.0
    once: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.used + other.used, self.once + other.once)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.used * times, self.once * times)


@dataclass(frozen=True)
class Rates:
    """What one device does at best, and what connects it to the others. 0: not given."""

    tflops: float = 0.0
    """Dense matrix products, in 10^12 operations per second."""
    memory: float = 0.0
    """Its memory, in 10^9 bytes per second."""
    link: float = 0.0
    """What it sends to other devices, in 10^9 bytes per second."""

    @property
    def given(self) -> bool:
        return bool(self.tflops and self.memory and self.link)

    def seconds(self, cost: Cost) -> float:
        """How long a device takes at least: for the operations, or for the bytes if they take longer."""
        return max(cost.flops / (self.tflops * 1e12), cost.used / (self.memory * 1e9))


Passes = dict[str, Cost]
"""The cost of an op by pass: "forward", and one or several passes of its backward."""


def total(costs: Iterable[Cost]) -> Cost:
    """Their sum."""
    return sum(costs, Cost())


def direction(passes: Mapping[str, Cost], backward: bool) -> Cost:
    """The forward pass of an op, or the sum of all its backward passes."""
    return total(cost for name, cost in passes.items() if (name != "forward") == backward)


@dataclass(frozen=True)
class Widths:
    """Bytes of a number, of an id, and of a position in an order that transposes slots."""

    number: int = FLOAT
    id: int = ID
    position: int = POSITION


# The size of a CLT


@dataclass(frozen=True)
class CLTSize:
    """The vectors and parameters of a CLT.

    `targets`: the number of layers that each module writes to. `upstream`: the number of modules whose latents it
    may read. Both have one entry per module.
    """

    d_model: int
    latents: int
    targets: tuple[int, ...]
    upstream: tuple[int, ...]

    @classmethod
    def of_mlps(cls, L: int, D: int, F: int) -> "CLTSize":
        """One module per layer, which writes to its own layer and all later ones, and reads all earlier modules."""
        return cls(D, F, tuple(range(L, 0, -1)), tuple(range(L)))

    @property
    def modules(self) -> int:
        return len(self.targets)

    @property
    def pairs(self) -> int:
        """Pairs of an upstream module and one that reads it."""
        return sum(self.upstream)

    @property
    def encoder_vectors(self) -> int:
        return self.modules * self.latents

    @property
    def decoder_vectors(self) -> int:
        return sum(self.targets) * self.latents

    @property
    def weights(self) -> int:
        """Entries of all encoder and decoder vectors."""
        return (self.encoder_vectors + self.decoder_vectors) * self.d_model

    @property
    def biases(self) -> int:
        """One per latent, and one vector [D] per module."""
        return self.modules * (self.latents + self.d_model)

    @property
    def parameters(self) -> int:
        return self.weights + self.biases


def adam_state_bytes(size: CLTSize, eight_bit: bool, touched_rows: bool) -> int:
    """Adam's two moments: float32, or one byte per weight and two float32 scales per vector, with float32 for biases.
    `touched_rows`: and the step at which each decoder row was last updated."""
    vectors = size.encoder_vectors + size.decoder_vectors
    moments = 2 * size.weights + 2 * FLOAT * vectors if eight_bit else 2 * FLOAT * size.weights
    return moments + 2 * FLOAT * size.biases + (POSITION * size.decoder_vectors if touched_rows else 0)


def dense_training_bytes(size: CLTSize, tokens: int, modes: int, number: int = FLOAT) -> dict[str, int]:
    """What a plain dense trainer of the same CLT holds at its peak.

    "states": parameters, gradients and Adam's two moments. "latents": the result of relu and the latents [N, F] of
    every module and mode, kept for backward, and those of the module at hand. "virtual weights", in both modes: for
    each pair of modules the matrix F x F before and after masking, and its mask.
    """
    one = tokens * size.latents * number
    pairs = size.pairs if modes > 1 else 0
    return {
        "states": 4 * number * size.parameters,
        "latents": 2 * one * (modes * size.modules + 1),
        "virtual weights": 3 * number * size.latents**2 * pairs,
    }


def adam_update(size: CLTSize, number: int) -> Cost:
    """One step of Adam: parameters and two moments are read and written, gradients are read."""
    moved = 7 * number * size.parameters
    return Cost(12 * size.parameters, moved, moved)


# Products with gathered rows, which most ops and gradients are made of: `bags` with `slots` each name some of `rows`
# vectors of D numbers.


def gather_sum(w: Widths, bags: int, slots: int, rows: int, D: int) -> Cost:
    """The weighted sum of the rows that each bag names. `row_dots`, the products of a bag's own vector with these
    rows, moves the same bytes with reading and writing exchanged."""
    pairs = bags * slots
    named = pairs * (w.id + w.number)
    row = D * w.number
    return Cost(2 * pairs * D, named + (pairs + bags) * row, named + (min(pairs, rows) + bags) * row)


row_dots = gather_sum


def transposed_gather_sum(w: Widths, bags: int, slots: int, rows: int, D: int) -> Cost:
    """For each row, the weighted sum of the bags that name it, over slots that are sorted by row already."""
    pairs = bags * slots
    lists = pairs * (w.position + w.number) + 2 * rows * w.position
    row = D * w.number
    return Cost(2 * pairs * D, lists + (pairs + rows) * row, lists + (bags + rows) * row)


# The ops, as our kernels compute them


def sparse_decode(w: Widths, N: int, D: int, F: int, K: int, T: int = 1) -> Passes:
    return {
        "forward": gather_sum(w, N, K, F, D * T),
        "d_values": row_dots(w, N, K, F, D * T),
        "dW": transposed_gather_sum(w, N, K, F, D * T),
    }


def topk_encode(w: Widths, N: int, D: int, F: int, K: int) -> Passes:
    """Pre-activations never leave the op, and only selected latents carry gradient. `batchtopk_encode` costs the
    same, K being the mean number of active latents."""
    forward = (N + F) * D * w.number + N * K * (w.number + w.id) + F * w.number
    db = F * w.number
    return {
        "forward": Cost(2 * N * F * D, forward, forward),
        "dx": gather_sum(w, N, K, F, D),
        "dW, db": transposed_gather_sum(w, N, K, F, D) + Cost(0, db, db),
    }


def jumprelu_encode(w: Widths, N: int, D: int, F: int, K: int) -> Passes:
    """`topk_encode` with a threshold per latent, and one byte per slot: whether it is near its threshold. K is the
    mean number of slots."""
    encode = topk_encode(w, N, D, F, K)
    read = F * w.number + N * K
    gradient = N * K * (1 + w.number + w.id) + 2 * F * w.number
    return encode | {
        "forward": encode["forward"] + Cost(0, read, read),
        "d_threshold": Cost(3 * N * K, gradient, gradient),
    }


def virtual_weights(w: Widths, D: int, F: int, C: int, U: int) -> Passes:
    return {
        "forward": row_dots(w, F, C, U, D),
        "dW": gather_sum(w, F, C, U, D),
        "dE": transposed_gather_sum(w, F, C, U, D),
    }


def mean_walks(N: int, F: int, C: int, U: int, S: int) -> float:
    """Connections that the active upstream latents of all tokens meet, when connections are spread evenly."""
    return N * S * C * F / U


def virtual_matmul(w: Widths, N: int, F: int, C: int, U: int, S: int, walks: float | None = None) -> Passes:
    """Each active upstream latent walks the latents that read it; `walks`: how many connections are met in all."""
    walks = mean_walks(N, F, C, U, S) if walks is None else walks
    slots, sums = N * S, N * F
    z = slots * (w.id + 2 * w.position) + slots * w.number  # ids, where their lists begin and end, values
    connections = F * C * (w.position + w.number)  # V in the order of upstream latents
    walked = walks * (w.position + w.number)
    # Summed in float32: halves are converted from a scratch of float32 in the end.
    added_up = sums * (FLOAT if w.number == FLOAT else 2 * FLOAT + w.number)
    met = min(walks, sums) * w.number  # entries of the result's gradient where a latent and a connection meet
    dV_lists = F * C * (w.position + w.id + w.number)
    return {
        "forward": Cost(2 * walks, z + walked + added_up, z + connections + sums * w.number),
        "dz": Cost(2 * walks, z + walked + walks * w.number, z + min(connections, walked) + met),
        "dV": Cost(
            2 * walks,
            dV_lists + 2 * F * C * w.position + walked + walks * w.number,
            dV_lists + slots * (w.position + w.number) + met,
        ),
    }


def connected_encode(
    w: Widths, N: int, D: int, F: int, K: int, C: int, U: int, S: int, walks: float | None = None
) -> Passes:
    """`topk_encode` of residual stream and upstream latents in one op, given the virtual weights V [F, C]; backward
    visits only the connections of the K latents that were selected for each token."""
    walks = mean_walks(N, F, C, U, S) if walks is None else walks
    slots = N * S
    scale = N * FLOAT
    z = slots * (w.id + 2 * w.position + w.number)
    walk = w.position + w.number
    encode = topk_encode(w, N, D, F, K)
    selected = N * K * C
    kept = F * C * (w.id + w.number)
    upstream = Cost(2 * walks, z + walks * walk + scale, z + F * C * walk + scale)
    gradients = (F * C + slots) * w.number
    # V, a value and a gradient at each of them; once: connections that any token selected, and the gradients.
    dz_dV = Cost(4 * selected, selected * (3 * w.number + w.id), min(selected * (w.id + w.number), kept) + gradients)
    return encode | {"forward": encode["forward"] + upstream, "dz, dV": dz_dV}


def select_connections(w: Widths, D: int, F: int, C: int, U: int) -> Passes:
    """Importance (float32) times the virtual weight of every pair of latents, of which the C best are kept."""
    moved = (F + U) * D * w.number + U * FLOAT + F * C * ID
    return {"forward": Cost(2 * F * U * D, moved, moved)}
