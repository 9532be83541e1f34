"""Whether a CLT's figures mean what they seem to: what is connected must matter, what is not must not, and shuffled
connections must be worse."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sparseclt import ops
from sparseclt.connections.selection import random_connections
from sparseclt.evaluation.agreement import Agreement, AgreementSums
from sparseclt.evaluation.metrics import captures, modes_of
from sparseclt.evaluation.reconnected import checked, connected
from sparseclt.evaluation.statistics import ModeStatistics, Variance
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT, in_evaluation_mode
from sparseclt.model.forward import ForwardPass
from sparseclt.model.replacement import replacement
from sparseclt.model.sites import Mode
from sparseclt.model.stream import UnmaskedStream
from sparseclt.model.upstream import UpstreamLatents
from sparseclt.ops.rows import row_dots


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What upstream latents add to the pre-activations of one MLP module's active latents, with all connections open:
    root mean squares over active latents and tokens, in units of pre-activations."""

    name: str
    """The module's site."""
    connected: float
    """Of the sum over the latent's own connections: what ablating these takes away."""
    unconnected: float
    """Of the sum over all other upstream latents."""
    random: float
    """Of the sum over as many random upstream latents as there are connections."""
    carried: float
    """Share of the upstream part's mean square that the own connections account for: 1 - (unconnected / total)^2."""
    carried_random: float
    """The same of the random ones."""


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """What `faithfulness` measured."""

    tokens: int
    """Held-out tokens, without position 0 of each row."""
    agreement: dict[str, Agreement]
    """By replaced model: "vanilla" and "sparse" mode, and "shuffled": sparsely-connected mode with random connections
    in place of the CLT's own."""
    fvu_sparse: float
    """Mean over modules."""
    fvu_shuffled: float
    """The same with the random connections."""
    ablations: tuple[Ablation, ...]
    """One entry per MLP module that has upstream modules; attention readers, which mix tokens, have none."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, which serialise to JSON."""
        return asdict(self)


@in_evaluation_mode
@torch.no_grad()
def faithfulness(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    *,
    batch_rows: int = 16,
    seed: int = 0,
    backend: str | None = None,
) -> Faithfulness:
    """Measure on `rows` [R, S] of held-out tokens, `batch_rows` of them at a time, whether `clt`'s connections matter.

    `seed`: of the random connections. Raises ValueError for a CLT without connections.
    """
    if len(modes_of(clt)) < 2:
        raise ValueError("clt: expected a CLT with connections, whose faithfulness can be measured, got one without")
    C = max(module.connections.C for module in clt if module.connections)
    shuffled, variance = checked(clt, random_connections(clt, C, seed)), Variance(clt)
    statistics = {name: ModeStatistics(clt) for name in ("sparse", "shuffled")}
    sums, upstream = AgreementSums(), _UpstreamParts(clt)
    chosen = {"connected": None, "random": shuffled}
    weights = {}  # the same for every batch
    for name, connections in chosen.items():
        with connected(clt, connections):
            weights[name] = clt.virtual_weights(backend)
    for batch, activations in captures(clt, language_model, rows, batch_rows):
        real = activations.outputs(clt.sites)
        variance.add(real, activations.counted_flat)
        logits = language_model.replaced_logits(batch)
        for name in ("vanilla", "sparse", "shuffled"):
            mode: Mode = "vanilla" if name == "vanilla" else "sparse"
            with connected(clt, shuffled if name == "shuffled" else None):
                hooks = replacement(clt, mode, backend)
                sums.add(name, logits, language_model.replaced_logits(batch, **hooks))
                if mode == "sparse":
                    statistics[name].add(clt(activations, mode, backend=backend), real)
        all_open = clt(activations, "sparse", backend=backend, open_connections="all")
        for name, connections in chosen.items():
            with connected(clt, connections):
                upstream.add(name, all_open, activations, weights[name], backend)
    return Faithfulness(
        tokens=variance.tokens,
        agreement=sums.means(),
        fvu_sparse=(statistics["sparse"].squared_error / variance.value()).mean().item(),
        fvu_shuffled=(statistics["shuffled"].squared_error / variance.value()).mean().item(),
        ablations=upstream.ablations(),
    )


class _UpstreamParts:
    """Sums of squares of what upstream latents add to pre-activations: all of them, some, and all but these."""

    def __init__(self, clt: SparseCLT):
        self.clt = clt
        self.sums = {name: torch.zeros(len(clt.sites), 4, dtype=torch.float64) for name in ("connected", "random")}

    def add(
        self,
        name: str,
        forward: ForwardPass,
        activations: Activations,
        V: Sequence[Tensor | None],
        backend: str | None,
    ) -> None:
        """Take in a pass with all connections open. `V`: virtual weights of the connections of that `name`."""
        clt = self.clt
        outputs = {site: forward.output(site) for site in clt.sites}
        given, whole = UnmaskedStream(clt, False), UnmaskedStream(clt, False, all_open=True)
        before = UpstreamLatents(clt.architecture, clt.sites)
        for m, (module, latents) in enumerate(zip(clt, forward.latents, strict=True)):
            site = module.site
            written = whole.before(site, activations, outputs) - given.before(site, activations, outputs)
            if module.upstream and site.kind == "mlp":
                on, ids = latents.values > 0, latents.indices.clamp_min(0)
                rows, scale = clt.reading_rows(m), activations.scale[site.layer].flatten()[:, None]
                total = row_dots(written.to(rows.dtype), ids, rows) / scale
                part = torch.zeros_like(total)
                weights, connections = V[m], module.connections
                if weights is not None and connections is not None:
                    z = before.of_first(clt.upstream[m])
                    part = ops.virtual_matmul(*z, weights, connections, backend=backend).gather(1, ids) / scale
                squares = [(x[on].double().square().sum()) for x in (total, part, total - part)]
                self.sums[name][m] += torch.stack([*squares, on.sum().double()]).cpu()
            before.add(latents)

    def ablations(self) -> tuple[Ablation, ...]:
        found = []
        for m, module in enumerate(self.clt):
            (total, own, rest, active), (_, some, others, _) = (
                self.sums[name][m].tolist() for name in ("connected", "random")
            )
            if not module.upstream or module.site.kind != "mlp":
                continue
            rms = [(square / max(active, 1)) ** 0.5 for square in (own, rest, some)]
            found.append(
                Ablation(
                    name=module.site.name, connected=rms[0], unconnected=rms[1], random=rms[2],
                    carried=1 - rest / max(total, 1e-30), carried_random=1 - others / max(total, 1e-30),
                )
            )  # fmt: skip
        return tuple(found)
