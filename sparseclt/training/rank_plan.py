"""What one of several ranks holds, and what it sends in a step."""

import math
from dataclasses import dataclass, replace

from sparseclt.connections.attended import KEYS
from sparseclt.costs import FLOAT, ID, POSITION
from sparseclt.training.run_sizes import ALWAYS, NOTED, MemoryTerm, RunSizes
from sparseclt.training.update import KEPT_BYTES

INT32, DOUBLE = 4, 8
# Terms of the plan of which each of n ranks holds one n-th; it holds the others as a rank by itself does.
SHARED = frozenset({
    "weights", "optimiser state", "encoder gradients", "reconstructions", "reconstructions by one module",
    "gradients of reconstructions, earlier micro-batches", "gradients of reconstructions, in backward",
    "gradients of reconstructions, for the update", "gradients of reconstructions, side by side",
    "one encoder's gradient", "connections", "virtual weights and their gradient", "effective decoders",
    "logits of connections", "encoder rows that choose", "connections chosen anew", "the same, rounded",
    "encoders in bf16", "decoders in bf16", "virtual weights in bf16",
})  # fmt: skip


@dataclass(frozen=True)
class Sent:
    """One exchange of a step: the bytes that a rank sends in it, counted as `parallel.Group.sent` counts."""

    name: str
    collective: str
    bytes: int
    formula: str


def of_rank(terms: list[MemoryTerm], x: RunSizes) -> list[MemoryTerm]:
    """The terms of a plan for each of x.ranks ranks that share the CLT."""
    if x.ranks == 1:
        return terms
    mine = [replace(t, bytes=-(-t.bytes // x.ranks)) if t.name in SHARED else t for t in terms]
    if not x.sparse:
        return mine
    n, encoders = x.ranks, x.w * x.F * x.D * len(x.readers)
    everyone = x.slots * (ID + POSITION) + POSITION * x.F * x.size.pairs
    partial = FLOAT * max(x.F * c for c in x.connections)
    return [
        *mine,
        MemoryTerm("connections of all ranks", everyone, ALWAYS, "12 F C + 4 U per reader"),
        MemoryTerm(
            "whole decoders that choose", FLOAT * x.F * x.D * max(x.readers) // n, ("selection",), "4 F D (L - 1) / n"
        ),
        MemoryTerm("virtual weights in part", partial, ("forward",), "4 F C of one reader"),
        MemoryTerm("encoder columns", encoders // n, NOTED, "w F D / n per reader"),
        MemoryTerm("gradients of all virtual weights", x.w * x.slots, NOTED, "w F C per reader"),
    ]


def step_exchanges(x: RunSizes) -> list[Sent]:
    """What a rank sends in a step of both modes, all rows at once and without choosing connections."""
    return [sent for sent in [*_over_latents(x), *_over_data(x), *_over_world(x)] if sent.bytes]


def exchanges_ahead(x: RunSizes) -> list[Sent]:
    """What the first rank of those that share the CLT sends for the next step, while this one is computed: the
    activations of the language model, whose norms are taken to be in front of its attention and MLPs only."""
    vectors = x.v * x.D * (1 + 3 * x.L) + FLOAT * x.L + ID + 1  # scales, token ids, whether they count
    patterns = x.L * (x.v * x.S * x.shape.heads + FLOAT) if x.config.clt.attention == "latents" else 0
    found = x.N * (vectors + patterns)
    shuffled = (x.data - 1) * found if x.config.activations.shuffle_bytes else 0
    sent = [
        Sent("activations", "broadcast", found if x.ranks > 1 else 0, "v N D (1 + 3 L)"),
        Sent("activations to be shuffled", "all_gather", shuffled, "v N D (1 + 3 L) (d - 1)"),
    ]
    return [one for one in sent if one.bytes]


def _over_latents(x: RunSizes) -> list[Sent]:
    n, candidates = x.ranks, sum(min(K, x.F // x.ranks) for K in x.Ks)
    if n == 1:
        return []
    jumprelu = x.modes * x.M * (x.config.clt.activation == "jumprelu")
    thresholds = 2 * jumprelu * FLOAT * (n - 1) * x.F // n
    of_thresholds = jumprelu * (FLOAT * x.F * (n - 1) // n)
    exchanged = x.exchanging * sum(_reduced(x.w * x.N * K, n) for K in x.Ks)
    counts = x.learned * (x.config.connections.open_per_latent is not None) * len(x.readers) * _reduced(ID, n)
    e, heads = max(FLOAT, x.w), x.heads_of_readers
    dV = (n - 1) * x.w * sum(h * (x.F // n) * c for h, c in zip(heads, x.connections, strict=True))
    columns = x.F // n * x.D * (n - 1) // n
    V = sum(h * (e * x.F * c * (n - 1) // n) for h, c in zip(heads, x.connections, strict=True))
    latents = x.modes * (n - 1) * x.N * candidates * (x.p + INT32)
    of_latents = x.modes * sum(_reduced(x.p * x.N * K, n) for K in x.Ks)
    return [
        Sent("latents", "all_gather", latents, "modes x M (n - 1) N K (p + 4)"),
        Sent("gradients of latents", "all_reduce", of_latents, "modes x M 2 p N K"),
        Sent("encoder rows for virtual weights", "all_to_all", sum(heads) * e * columns, "4 F D / n per reader"),
        Sent("virtual weights", "reduce_scatter", V, "4 F C per reader"),
        Sent("gradients of virtual weights", "all_gather", dV, "w F C per reader"),
        Sent("encoder rows for decoder gradients", "all_to_all", sum(heads) * x.w * columns, "w F D / n per reader"),
        Sent("encoder gradients", "all_to_all", sum(heads) * e * columns, "4 F D / n per reader"),
        Sent("squares of gradients", "all_reduce", _reduced(DOUBLE * x.gradients, n), "2 x 8 per parameter tensor"),
        Sent("thresholds", "all_gather", thresholds, "jumprelu: modes x 2 M 4 F"),
        Sent("gradients of thresholds", "reduce_scatter", of_thresholds, "jumprelu: modes x M 4 F"),
        Sent("gradients of latents, for candidates", "all_reduce", exchanged, "if exchanged: M 2 w N K"),
        Sent("open connections", "all_reduce", counts, "if steered: 2 x 8 per reader"),
    ]


def _over_data(x: RunSizes) -> list[Sent]:
    d = x.data
    if d == 1:
        return []
    own = x.F // x.ranks
    c = x.config.connections
    keys = (x.sparse and c.policy != "random" and c.importance == "coactivation") * x.N * (x.M - x.L) * min(KEYS, x.S)
    latents = (d - 1) * (x.modes * x.N * (x.active * (x.w + ID) + 1) + keys * (INT32 + FLOAT))
    encoders = x.M * (_reduced(x.w * own * x.D, d) + _reduced(x.w * own, d))
    decoders = sum(_reduced(max(FLOAT, x.w) * x.F * T * x.D // x.ranks, d) + _reduced(x.F, d) for T in x.size.targets)
    if FLOAT * x.size.decoder_vectors * x.D // x.ranks > KEPT_BYTES:
        decoders *= 2  # for the norm, and again for the update
    activation, slots = x.config.clt.activation, x.N * x.active
    batchtopk = x.modes * (activation == "batchtopk")
    candidates = batchtopk * (d - 1) * x.w * slots
    thresholds = (activation == "jumprelu") * x.M * _reduced(FLOAT * own, d)
    logits = x.learned * sum(_reduced(FLOAT * own * c, d) for c in x.connections)
    mlps = sum(site.kind == "mlp" for site in x.sites)
    places = (x.M - mlps) * x.shape.heads * (ID + FLOAT)  # one of each head's keys, and its weight
    exchanged = x.exchanging * (d - 1) * (x.w * slots + x.N * (1 + mlps * FLOAT + places))
    dV = sum(h * _reduced(x.w * own * c, d) for h, c in zip(x.heads_of_readers, x.connections, strict=True))
    counts = (1 + batchtopk + (activation != "topk")) * _reduced(ID, d)
    means = x.M * (_reduced(x.mean_number * x.D, d) + _reduced(x.mean_number, d))
    return [
        Sent("latents, for statistics", "all_gather", latents, "modes x (M N K (w + 8) + N) (d - 1)"),
        Sent("gradients of encoders", "all_reduce", encoders, "2 w F D / n per module"),
        Sent("gradients of decoders", "all_reduce", decoders, "2 x 4 F T D / n per module; twice above 256 MiB"),
        Sent("gradients of virtual weights, data", "all_reduce", dV, "2 w F C / n per reader"),
        Sent("means of outputs", "all_reduce", means, "2 x 4 D per module"),
        Sent("candidates of a batch", "all_gather", candidates, "batchtopk: modes x M w N K (d - 1)"),
        Sent("tokens of a batch", "all_reduce", counts, "2 x 8, up to 4 times"),
        Sent("gradients of thresholds, data", "all_reduce", thresholds, "jumprelu: M 2 x 4 F / n"),
        Sent("gradients of logits", "all_reduce", logits, "if learned: 2 x 4 F C / n per reader"),
        Sent("gradients of latents, data", "all_gather", exchanged, "if exchanged: M N K w (d - 1)"),
    ]


def _over_world(x: RunSizes) -> list[Sent]:
    world = x.ranks * x.data
    if world == 1:
        return []
    l0 = x.modes * x.M * (x.config.clt.activation == "jumprelu") * bool(x.config.loss.l0_weight)
    entropies = x.modes * bool(x.config.loss.cross_entropy_weight)
    sums = x.mean_number * (x.modes * 3 * x.M + (x.modes - 1) * x.M * (2 + x.F) + l0 + entropies)
    pressure = x.learned * (x.modes - 1) * _reduced(FLOAT, world)
    return [
        Sent("sums of the loss", "all_reduce", _reduced(sums, world), "2 x 4 (6 M + M (2 + F))"),
        Sent("pressure on connections", "all_reduce", pressure, "if learned: 2 x 4"),
        Sent("gradients of decoder biases", "all_reduce", x.M * _reduced(x.w * x.D, world), "2 w D per module"),
    ]


def _reduced(size: int, ranks: int) -> int:
    """Bytes that a rank sends in an all-reduce of `size` bytes."""
    return 2 * size * (ranks - 1) // ranks


def selection_bytes(x: RunSizes) -> int:
    """What a rank sends when connections are chosen, or candidates exchanged."""
    n, e = x.ranks, max(FLOAT, x.w)
    if not x.sparse or n == 1:
        return 0
    sent, most = 0, math.ceil(x.config.connections.exchange_share * x.config.connections.per_latent)
    for u, C, heads in zip(x.readers, x.connections, x.heads_of_readers, strict=True):
        kept = min(C, most) if x.exchanging else C
        decoders, encoders = e * u * x.F * (x.D // n) * (n - 1) // n, heads * (n - 1) * e * (x.F // n) * x.D
        sent += decoders + encoders + (e + INT32) * x.F * min(kept, u * x.F // n) * (n - 1) // n
        sent += x.shares_out * (n - 1) * e * (x.F // n) * C
    if x.shares_out:
        read = zip(x.size.targets, x.size.upstream, strict=True)
        sent += sum(_reduced(FLOAT * x.F * targets, n) for targets, upstream in read if upstream)
    return sent
