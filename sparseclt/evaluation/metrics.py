"""How well a CLT does on held-out text, in each mode."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseclt.evaluation.statistics import ModeStatistics, Variance
from sparseclt.evaluation.structure import connection_structure, splitting
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT, in_evaluation_mode
from sparseclt.model.replacement import replacement
from sparseclt.model.sites import Kind, Mode, Site


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of one module, or their mean over modules. None: not measured, as there is no sparsely-connected mode
    or nothing upstream."""

    fvu_vanilla: float
    """Fraction of variance unexplained in vanilla mode, relative to the mean over all tokens."""
    l0_vanilla: float
    """Active latents per token."""
    dead_vanilla: float
    """Share of latents (0 to 1) that fired on none of the tokens."""
    fvu_sparse: float | None = None
    """As `fvu_vanilla`, in sparsely-connected mode."""
    l0_sparse: float | None = None
    dead_sparse: float | None = None
    excess_fvu: float | None = None
    """`fvu_sparse - fvu_vanilla`; its mean is over the modules that have upstream modules."""
    splitting: float | None = None
    """Share of latents with a near twin in the same module: decoder cosine above 0.9."""
    connections_in_effect: float | None = None
    """Median over live latents of the open connections with |V| > 1e-4."""
    fan_out_top1pct: float | None = None
    """Share of all connections in effect that the 1 % most used upstream latents serve."""


@dataclass(frozen=True, kw_only=True)
class ModuleMetrics(Metrics):
    """The metrics of one module."""

    name: str
    """Its site: "mlp_0", "attn_3", ..."""
    upstream: int
    """Its upstream latents (U)."""


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
    fvu_against_C: list[dict[str, Any]] = field(default_factory=list)
    """For a whole run: the trained weights with other numbers of connections (`evaluation.pruning.fvu_against_c`)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which serialise to JSON."""
        return asdict(self)


def modes_of(clt: SparseCLT) -> list[Mode]:
    """The modes that `clt` can run in."""
    return ["vanilla", "sparse"] if clt.connected and clt.reads_upstream else ["vanilla"]


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

    `cross_entropy=False` leaves out the runs of the language model with replaced outputs, which take most of the time.
    """
    modes = modes_of(clt)
    statistics = {mode: ModeStatistics(clt) for mode in modes}
    M, variance = len(clt.sites), Variance(clt)
    entropies: dict[str, float] = {}
    for batch, activations in captures(clt, language_model, rows, batch_rows):
        real = activations.outputs(clt.sites)
        variance.add(real, activations.counted_flat)
        for mode in modes:
            statistics[mode].add(clt(activations, mode, backend=backend), real)
        if cross_entropy:
            for name, value in _cross_entropies(clt, language_model, batch, modes, backend).items():
                entropies[name] = entropies.get(name, 0.0) + value * len(batch) / len(rows)
    V = clt.virtual_weights(backend) if "sparse" in modes else [None] * M
    modules = tuple(
        ModuleMetrics(**module_row(clt, m, statistics, variance), **_structure(clt, m, V[m], statistics))
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


def module_row(clt: SparseCLT, m: int, statistics: dict[Mode, ModeStatistics], variance: Variance) -> dict[str, Any]:
    """The fields of `ModuleMetrics` that follow from activations."""
    row: dict[str, Any] = {"name": clt.sites[m].name, "upstream": clt.transcoder(m).upstream}
    for mode, s in statistics.items():
        row[f"fvu_{mode}"] = (s.squared_error / variance.value())[m].item()
        row[f"l0_{mode}"] = s.active[m].item() / variance.tokens
        row[f"dead_{mode}"] = (s.fired[m] == 0).double().mean().item()
    if "sparse" in statistics:
        row["excess_fvu"] = row["fvu_sparse"] - row["fvu_vanilla"]
    return row


def _structure(clt: SparseCLT, m: int, V: Tensor | None, statistics: dict[Mode, ModeStatistics]) -> dict[str, Any]:
    """The fields that follow from connections and decoders."""
    module = clt.transcoder(m)
    structure: dict[str, Any] = {"splitting": splitting(module.W_dec.flatten(1))}
    if V is not None:
        structure |= connection_structure(module, V, live=statistics["sparse"].fired[m] > 0)
    return structure


def mean_over_modules(modules: Sequence[ModuleMetrics]) -> Metrics:
    """Means over the modules that have a value; of the excess, over those that have upstream modules."""
    means: dict[str, Any] = {}
    for name in (metric.name for metric in fields(Metrics)):
        values = [getattr(m, name) for m in modules if m.upstream or name != "excess_fvu"]
        measured = [value for value in values if value is not None]
        means[name] = sum(measured) / len(measured) if measured else None
    return Metrics(**means)
