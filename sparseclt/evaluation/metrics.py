"""How well a CLT does on held-out text, in each mode."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import Importance
from sparseclt.connections.activity import Activity, RecentLatents
from sparseclt.connections.policies import select_top_connections
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.forward import ForwardPass
from sparseclt.model.sites import Mode, Site
from sparseclt.ops import Connections
from sparseclt.training.losses import targets

VIRTUAL_WEIGHT_IN_EFFECT = 1e-4
SPLIT_COSINE = 0.9


def replacement(
    clt: SparseCLT, mode: Mode, backend: str | None = None, *, gradients: DecoderGradients | None = None
) -> dict[str, Callable[..., Tensor]]:
    """Hooks for `LanguageModel.replaced_logits` and `cross_entropy`: every module's site gets its reconstruction.

    The modules read the replaced run itself, layer by layer; nothing of the real run is left. In
    sparsely-connected mode the frozen parts (norm scales, attention) are that run's own.
    """
    forward = ForwardPass(clt, mode, backend, gradients=gradients)
    hooks: dict[str, Callable[..., Tensor]] = {"on_mlp": lambda layer, live: forward.advance(Site("mlp", layer), live)}
    if clt.architecture.attention == "latents":
        hooks["on_attn"] = lambda layer, live: forward.advance(Site("attn", layer), live)
    return hooks


def zero_ablation(layer: int, live: Activations) -> Tensor:
    return torch.zeros_like(live.r_0)


class _ModeStatistics:
    """Sums over batches for one mode."""

    def __init__(self, clt: SparseCLT):
        M, F = len(clt.sites), clt.architecture.latents
        self.squared_error = torch.zeros(M, dtype=torch.float64)
        self.active = torch.zeros(M, dtype=torch.float64)
        self.fired = torch.zeros(M, F, dtype=torch.int64)

    def add(self, forward: ForwardPass, real: dict[Site, Tensor]) -> None:
        for m, (site, latents) in enumerate(zip(forward.clt.sites, forward.latents, strict=True)):
            self.squared_error[m] += (real[site] - forward.output(site)).double().square().sum().cpu()
            on = latents.values > 0
            self.active[m] += on.sum().cpu()
            self.fired[m] += torch.bincount(latents.indices[on], minlength=self.fired.shape[1]).cpu()


class _Variance:
    """Squared distance of every site's real output from its mean, summed over batches."""

    def __init__(self, clt: SparseCLT):
        M, D = len(clt.sites), clt.architecture.d_model
        self.total, self.square = torch.zeros(M, D, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)
        self.tokens = 0

    def add(self, real: dict[Site, Tensor]) -> None:
        for m, y in enumerate(real.values()):
            self.total[m] += y.double().sum(0).cpu()
            self.square[m] += y.double().square().sum().cpu()
        self.tokens += len(y)

    def value(self) -> Tensor:
        """[M]"""
        return self.square - self.total.square().sum(1) / self.tokens


@torch.no_grad()
def evaluate(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    *,
    batch_rows: int = 16,
    cross_entropy: bool = True,
    backend: str | None = None,
) -> dict[str, Any]:
    """Measure `clt` on `rows` [R, S] of held-out tokens; plain numbers that serialise to JSON.

    Per module and in the mean: FVU in both modes and their difference ("excess_fvu": sparse minus vanilla of
    this CLT; the mean is over modules that have upstream modules), connections in effect (median over
    live latents of the open connections with |V| > 1e-4), L0, the share of latents that fired on none of the
    tokens ("dead"), the share of all connections that the 1 % most used upstream latents serve, and the share
    of latents with a near twin ("splitting": decoder cosine > 0.9). Cross-entropy in nats a token: of the model itself,
    with every site replaced in each mode, and with them zero-ablated.
    """
    modes: list[Mode] = ["vanilla", "sparse"] if clt.connected and any(m.upstream for m in clt) else ["vanilla"]
    statistics = {mode: _ModeStatistics(clt) for mode in modes}
    M, variance = len(clt.sites), _Variance(clt)
    entropies: dict[str, float] = {}
    for batch, activations in _captures(clt, language_model, rows, batch_rows):
        real = targets(clt, activations)
        variance.add(real)
        for mode in modes:
            statistics[mode].add(clt(activations, mode, backend=backend), real)
        if cross_entropy:
            for name, value in _cross_entropies(clt, language_model, batch, modes, backend).items():
                entropies[name] = entropies.get(name, 0.0) + value * len(batch) / len(rows)
    modules = [_module_row(clt, m, statistics, variance) for m in range(M)]
    V = clt.virtual_weights(backend) if "sparse" in modes else [None] * M
    for m, row in enumerate(modules):
        row |= _structure(clt, m, V[m], statistics)
    return {
        "tokens": variance.tokens,
        "C": max((m.connections.C for m in clt if m.connections), default=0),
        "modules": modules,
        "mean": _mean(clt, modules),
        "cross_entropy": entropies,
    }


def _cross_entropies(clt, language_model, tokens, modes, backend) -> dict[str, float]:
    zero = {"on_mlp": zero_ablation}
    if clt.architecture.attention == "latents":
        zero["on_attn"] = zero_ablation
    result = {
        "model": language_model.cross_entropy(tokens).item(),
        "zero_ablated": language_model.cross_entropy(tokens, **zero).item(),
    }
    for mode in modes:
        hooks = replacement(clt, mode, backend)
        result[mode] = language_model.cross_entropy(tokens, **hooks).item()
    return result


def _captures(clt: SparseCLT, language_model: LanguageModel, rows: Tensor, batch_rows: int):
    """Batches of `rows` with the model's activations on them."""
    for batch in rows.to(next(clt.parameters()).device).split(batch_rows):
        yield batch, language_model.capture(batch, attention=clt.architecture.attention == "latents")


def _module_row(clt, m: int, statistics: dict[Mode, _ModeStatistics], variance: _Variance) -> dict[str, Any]:
    row: dict[str, Any] = {"name": clt.sites[m].name, "upstream": clt.transcoder(m).upstream}
    for mode, s in statistics.items():
        row[f"fvu_{mode}"] = (s.squared_error / variance.value())[m].item()
        row[f"l0_{mode}"] = s.active[m].item() / variance.tokens
        row[f"dead_{mode}"] = (s.fired[m] == 0).double().mean().item()
    if "sparse" in statistics:
        row["excess_fvu"] = row["fvu_sparse"] - row["fvu_vanilla"]
    return row


def _structure(clt: SparseCLT, m: int, V: Tensor | None, statistics) -> dict[str, float | None]:
    """What the connections and decoders of module m look like."""
    module = clt.transcoder(m)
    structure: dict[str, float | None] = {"splitting": splitting(module.W_dec.flatten(1))}
    open_connections = module.open_connections()
    if V is None or open_connections is None or module.connections is None:
        return structure
    strength = V.abs() if V.dim() == 2 else V.abs().amax(0)
    live = (statistics["sparse"].fired[m] > 0).to(V.device)
    used = open_connections & (strength > VIRTUAL_WEIGHT_IN_EFFECT)
    counts = used[live].sum(1)
    structure["connections_in_effect"] = counts.double().median().item() if len(counts) else 0.0
    fan_out = torch.bincount(module.connections.indices[used & live[:, None]], minlength=module.upstream)
    hubs = fan_out.sort(descending=True).values[: max(1, module.upstream // 100)].sum()
    structure["fan_out_top1pct"] = (hubs / fan_out.sum().clamp_min(1)).item()
    return structure


def splitting(decoders: Tensor, tile: int = 1024) -> float:
    """Share of latents whose nearest neighbour in the module has a decoder cosine above 0.9; `decoders` [F, T D].

    By tiles of rows and columns: F x F is never allocated.
    """
    unit = torch.nn.functional.normalize(decoders.detach(), dim=1)
    nearest = []
    for i, rows in enumerate(unit.split(tile)):
        best = rows.new_full((len(rows),), -1.0)
        for j, columns in enumerate(unit.split(tile)):
            cosine = rows @ columns.T
            if i == j:
                cosine.fill_diagonal_(-1.0)
            best = torch.maximum(best, cosine.amax(1))
        nearest.append(best)
    return (torch.cat(nearest) > SPLIT_COSINE).double().mean().item()


@torch.no_grad()
def fvu_against_c(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    Cs: Sequence[int],
    *,
    importance: Importance = "coactivation",
    batch_rows: int = 16,
    backend: str | None = None,
) -> list[dict[str, Any]]:
    """Choose each C's most important connections of the trained weights, without training on, and measure.

    Connections are chosen on every other row of `rows` [R, S] and measured on the rest. One row a C: {"C",
    "fvu_vanilla", "fvu_sparse", "excess_fvu"}, means over modules as in `evaluate`. The CLT's own connections are
    put back.
    """
    if len(rows) < 2:
        raise ValueError(f"rows: expected at least 2, one to choose on and one to measure on, got {len(rows)}")
    M, a, device = len(clt.sites), clt.architecture, next(clt.parameters()).device
    recent = RecentLatents(M, a.active, rows[::2].numel(), device)
    activity = Activity(M, a.latents, device=device, recent=recent)
    for _, activations in _captures(clt, language_model, rows[::2], batch_rows):
        activity.update(clt(activations, "vanilla", backend=backend).latents)
    # Chosen best first: those of a smaller C are the first C. Checked and sorted here, once for all batches.
    best = list(zip(clt, select_top_connections(clt, activity, max(Cs), importance, backend), strict=True))
    chosen = {C: [ids if ids is None else Connections(ids[:, :C], module.upstream) for module, ids in best] for C in Cs}
    variance, vanilla, sparse = _Variance(clt), _ModeStatistics(clt), {C: _ModeStatistics(clt) for C in Cs}
    own = [(module.connections, module.logits) for module in clt]
    try:
        for module in clt:
            module.logits = None
        for _, activations in _captures(clt, language_model, rows[1::2], batch_rows):
            real = targets(clt, activations)
            variance.add(real)
            vanilla.add(clt(activations, "vanilla", backend=backend), real)
            for C in Cs:
                for module, connections in zip(clt, chosen[C], strict=True):
                    module.connections = connections
                sparse[C].add(clt(activations, "sparse", backend=backend), real)
    finally:
        for module, (connections, logits) in zip(clt, own, strict=True):
            module.connections, module.logits = connections, logits
    points = []
    for C in Cs:
        statistics: dict[Mode, _ModeStatistics] = {"vanilla": vanilla, "sparse": sparse[C]}
        mean = _mean(clt, [_module_row(clt, m, statistics, variance) for m in range(M)])
        points.append({"C": C, **{name: mean[name] for name in ("fvu_vanilla", "fvu_sparse", "excess_fvu")}})
    return points


def _mean(clt: SparseCLT, modules: list[dict[str, Any]]) -> dict[str, float]:
    names = {name for row in modules for name in row} - {"name", "upstream"}
    mean = {}
    for name in sorted(names):
        values = [
            row[name] for row in modules if row.get(name) is not None and (row["upstream"] or name != "excess_fvu")
        ]
        if values:
            mean[name] = sum(values) / len(values)
    return mean
