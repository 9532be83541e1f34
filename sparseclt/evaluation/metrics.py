"""How well a CLT does on held-out text, in each mode."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseclt.evaluation.over_ranks import add_up_, added_up, own_share
from sparseclt.evaluation.statistics import DENSITY_EDGES, ModeStatistics, Twins, Variance
from sparseclt.evaluation.structure import NEAR, TWIN, connection_structure, nearest_of
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT, in_evaluation_mode
from sparseclt.model.replacement import replacement
from sparseclt.model.sites import MODES, Kind, Mode, Open, Site

EXCESS = ("excess_fvu", "propagated_error", "cost_of_sparsity")


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of one module, or their mean over modules. None: not measured, as there is no sparsely-connected mode
    or nothing upstream."""

    fvu_vanilla: float
    """Fraction of variance unexplained in vanilla mode, relative to the mean over all tokens."""
    l0_vanilla: float
    """Active latents per token."""
    dead_vanilla: float
    """Share of latents (0 to 1) that fired on none of the held-out tokens, `Evaluation.tokens` of them."""
    fvu_sparse: float | None = None
    """As `fvu_vanilla`, in sparsely-connected mode."""
    l0_sparse: float | None = None
    dead_sparse: float | None = None
    excess_fvu: float | None = None
    """`fvu_sparse - fvu_vanilla`, the sum of the next two; means of these three are over the modules that have upstream
    modules."""
    propagated_error: float | None = None
    """`fvu_all_open - fvu_vanilla`: what upstream modules fail to reconstruct and later ones read."""
    cost_of_sparsity: float | None = None
    """`fvu_sparse - fvu_all_open`: what leaving connections out costs; below 0 where the weights, which were trained
    with these connections, do worse with all of them."""
    fvu_all_open: float | None = None
    """FVU in sparsely-connected mode with every upstream latent connected; not trained on."""
    fvu_disconnected: float | None = None
    """FVU in sparsely-connected mode with no upstream latent connected: an ablation of these weights, which were not
    trained so. A run with C = 0 is (see `experiments.sweeps.sweep`)."""
    dead_in_training_vanilla: float | None = None
    """Share of latents that fired on none of the last 1,000,000 training tokens; None: fewer were trained on."""
    dead_in_training_sparse: float | None = None
    splitting: float | None = None
    """Share of latents with a near twin in the same module: decoder cosine above 0.9."""
    splitting_near: float | None = None
    """The same above 0.7."""
    cofiring_twins: float | None = None
    """Share of latents that fire, in vanilla mode, with their nearest decoder on more than half of the tokens on which
    either of the two does."""
    connections_in_effect: float | None = None
    """Median over live latents of the open connections with |V| > 1e-4."""
    connections_mean: float | None = None
    """Their mean over live latents: with learned connections few latents have most of them."""
    fan_out_top1pct: float | None = None
    """Share of all connections in effect that the 1 % most used upstream latents serve."""


@dataclass(frozen=True, kw_only=True)
class ModuleMetrics(Metrics):
    """The metrics of one module."""

    name: str
    """Its site: "mlp_0", "attn_3", ..."""
    upstream: int
    """Its upstream latents (U)."""
    density: dict[str, list[int]] = field(default_factory=dict)
    """By mode: how many latents fire at a rate (tokens on which they do, over all) whose log10 is between each two
    neighbours in `Evaluation.density_edges`; rarer ones count in the first bin, dead ones in none."""


@dataclass(frozen=True)
class CrossEntropies:
    """Mean next-token cross-entropy in nats per token, without the prediction made at position 0 of each row; None: not
    measured."""

    model: float
    """Of the language model itself."""
    zero_ablated: float
    """With every site's output set to zero, except at position 0 of each row."""
    vanilla: float
    """With every site replaced by its reconstruction in vanilla mode, on the replaced run itself."""
    sparse: float | None = None
    """The same in sparsely-connected mode."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    tokens: int
    """Held-out tokens, without position 0 of each row, which no figure includes."""
    C: int
    """Slots for connections of each latent; 0 without connections."""
    modules: tuple[ModuleMetrics, ...]
    """One entry per module, in model order."""
    mean: Metrics
    """Means over modules."""
    cross_entropy: CrossEntropies | None = None
    density_edges: tuple[float, ...] = DENSITY_EDGES
    """log10 of a firing rate: the bins of `ModuleMetrics.density`."""
    fvu_against_C: list[dict[str, Any]] = field(default_factory=list)
    """For a whole run: the trained weights with other numbers of connections (`evaluation.pruning.fvu_against_c`)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which serialise to JSON."""
        return asdict(self)


def modes_of(clt: SparseCLT) -> list[Mode]:
    """The modes that `clt` can run in."""
    return ["vanilla", "sparse"] if clt.connected and clt.reads_upstream else ["vanilla"]


def passes_of(clt: SparseCLT) -> dict[str, tuple[Mode, Open]]:
    """The passes that are measured, by the name of their FVU: a mode, and the connections that are open in it."""
    passes: dict[str, tuple[Mode, Open]] = {mode: (mode, "own") for mode in modes_of(clt)}
    return passes | {"all_open": ("sparse", "all"), "disconnected": ("sparse", "none")} if len(passes) > 1 else passes


@in_evaluation_mode
@torch.no_grad()
def evaluate(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    *,
    batch_rows: int = 16,
    cross_entropy: bool = True,
    backend: str | None = None,
) -> Evaluation:
    """Measure `clt` on `rows` [R, S] of held-out tokens, `batch_rows` of them at a time, in each mode.

    Of a CLT that is spread over ranks, all of them call this with the same rows, and share them.

    `cross_entropy=False` leaves out the runs of the language model with replaced outputs, which take most of the time.
    """
    modes, passes = modes_of(clt), passes_of(clt)
    statistics = {name: ModeStatistics(clt) for name in passes}
    nearest = [nearest_of(module) for module in clt]
    M, variance, twins = len(clt.sites), Variance(clt), Twins([index for _, index in nearest])
    entropies: dict[str, float] = {}
    for batch, activations in captures(clt, language_model, own_share(clt, rows), batch_rows):
        real = activations.outputs(clt.sites)
        variance.add(real, activations.counted_flat)
        for name, (mode, open_connections) in passes.items():
            forward = clt(activations, mode, backend=backend, open_connections=open_connections)
            statistics[name].add(forward, real)
            if name == "vanilla":
                twins.add(forward.latents)
            del forward  # before the next one is made
        if cross_entropy:
            for name, value in _cross_entropies(clt, language_model, batch, modes, backend).items():
                entropies[name] = entropies.get(name, 0.0) + value * len(batch) / len(rows)
    of_passes = [part for s in statistics.values() for part in s.sums()]
    add_up_(clt, [*variance.sums(), *of_passes, *twins.both])
    entropies = added_up(clt.ranks.data, entropies)
    V = clt.virtual_weights(backend) if "sparse" in modes else [None] * M
    modules = tuple(
        ModuleMetrics(
            **module_row(clt, m, statistics, variance),
            **_connections(clt, m, V[m], statistics),
            **_latents(m, modes, statistics, variance.tokens, nearest[m][0], twins),
        )
        for m in range(M)
    )
    return Evaluation(
        tokens=variance.tokens,
        C=max((module.connections.C for module in clt if module.connections), default=0),
        modules=modules,
        mean=mean_over_modules(modules),
        cross_entropy=CrossEntropies(**entropies) if entropies else None,
    )


def _cross_entropies(
    clt: SparseCLT, language_model: LanguageModel, tokens: Tensor, modes: Sequence[Mode], backend: str | None
) -> dict[str, float]:
    zero = {"on_mlp": partial(_zero_ablation, "mlp")}
    if clt.architecture.attention == "latents":
        zero["on_attn"] = partial(_zero_ablation, "attn")
    result = {
        "model": language_model.cross_entropy(tokens).item(),
        "zero_ablated": language_model.cross_entropy(tokens, **zero).item(),
    }
    for mode in modes:
        hooks = replacement(clt, mode, backend)
        result[mode] = language_model.cross_entropy(tokens, **hooks).item()
    return result


def _zero_ablation(kind: Kind, layer: int, live: Activations) -> Tensor:
    real = live.output(Site(kind, layer))
    return live.where_counted(torch.zeros_like(real), real).view_as(live.r_0).to(live.r_0.dtype)


def captures(
    clt: SparseCLT, language_model: LanguageModel, rows: Tensor, batch_rows: int
) -> Iterator[tuple[Tensor, Activations]]:
    """Batches of `rows` with the model's activations on them."""
    for batch in rows.to(next(clt.parameters()).device).split(batch_rows):
        yield batch, language_model.capture(batch, attention=clt.architecture.attention == "latents")


def module_row(clt: SparseCLT, m: int, statistics: dict[str, ModeStatistics], variance: Variance) -> dict[str, Any]:
    """The fields of `ModuleMetrics` that follow from the errors and latents of some of `passes_of`."""
    row: dict[str, Any] = {"name": clt.sites[m].name, "upstream": clt.transcoder(m).upstream}
    for name, s in statistics.items():
        row[f"fvu_{name}"] = (s.squared_error / variance.value())[m].item()
        if name in MODES:
            row[f"l0_{name}"] = s.active[m].item() / variance.tokens
            row[f"dead_{name}"] = (s.fired[m] == 0).double().mean().item()
    if "sparse" in statistics:
        row["excess_fvu"] = row["fvu_sparse"] - row["fvu_vanilla"]
    if "all_open" in statistics:
        row["propagated_error"] = row["fvu_all_open"] - row["fvu_vanilla"]
        row["cost_of_sparsity"] = row["fvu_sparse"] - row["fvu_all_open"]
    return row


def _connections(clt: SparseCLT, m: int, V: Tensor | None, statistics: dict[str, ModeStatistics]) -> dict[str, Any]:
    """The fields that follow from connections."""
    module = clt.transcoder(m)
    if V is not None:
        return connection_structure(module, V, live=statistics["sparse"].fired[m] > 0)
    none = {"connections_in_effect": 0.0, "connections_mean": 0.0}
    return none if module.connections else {}  # connected, with C = 0


def _latents(
    m: int, modes: Sequence[Mode], statistics: dict[str, ModeStatistics], tokens: int, cosine: Tensor, twins: Twins
) -> dict[str, Any]:
    """The fields that follow from how often latents fire, and from the cosine [F] with the nearest decoder."""
    return {
        "splitting": (cosine > TWIN).double().mean().item(),
        "splitting_near": (cosine > NEAR).double().mean().item(),
        "cofiring_twins": twins.share(m, statistics["vanilla"].fired[m]),
        "density": {mode: statistics[mode].density(m, tokens) for mode in modes},
    }


def mean_over_modules(modules: Sequence[ModuleMetrics]) -> Metrics:
    """Means over the modules that have a value; of the excess and its parts, over those that have upstream modules."""
    means: dict[str, Any] = {}
    for name in (metric.name for metric in fields(Metrics)):
        values = [getattr(m, name) for m in modules if m.upstream or name not in EXCESS]
        measured = [value for value in values if value is not None]
        means[name] = sum(measured) / len(measured) if measured else None
    return Metrics(**means)
