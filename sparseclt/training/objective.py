"""The training loss of a batch, and its gradient: all rows at once, or a micro-batch of rows at a time."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.connections.activity import Activity
from sparseclt.connections.policies import ConnectionPolicy
from sparseclt.evaluation.metrics import replacement
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.modules import Latents
from sparseclt.model.sites import Mode, Site
from sparseclt.training import losses
from sparseclt.training.memory import is_out_of_memory

Values = dict[str, Tensor]
Means = dict[Site, Tensor]


@dataclass
class Outcome:
    """What the loss reads of one mode's pass over some rows."""

    outputs: dict[Site, Tensor]  # [N, D] reconstructions
    latents: list[Latents]  # one a module
    explained: dict[Site, Tensor] = field(default_factory=dict)  # [N, D] what dead latents would write, for AuxK
    cross_entropy: Tensor | None = None  # of the replaced model, a mean over tokens


class Term(NamedTuple):
    """A term of the loss, as sums over the tokens it is made of: a sum of FVUs or means, times a weight."""

    mode: Mode
    weight: float
    sums: Sequence[losses.Unexplained | losses.Total]

    def value(self, tokens: int) -> Tensor:
        return torch.stack([s.value(tokens) for s in self.sums]).sum()

    def tensors(self) -> list[Tensor]:
        return [tensor for s in self.sums for tensor in s]

    def with_tensors(self, tensors: Iterator[Tensor]) -> "Term":
        return self._replace(sums=[type(s)(*(next(tensors) for _ in s)) for s in self.sums])


class Backward(NamedTuple):
    """What a backward pass leaves: decoder gradients, the loss terms, and each mode's latents."""

    gradients: DecoderGradients
    terms: Values
    latents: dict[Mode, list[Latents]]


class Objective:
    """The loss of both modes, as a function of weights, connections and the latents that are dead."""

    def __init__(
        self,
        config: TrainConfig,
        clt: SparseCLT,
        policy: ConnectionPolicy | None,
        activity: Mapping[Mode, Activity],
        language_model: LanguageModel,
    ):
        self.config, self.clt, self.policy = config, clt, policy
        self.activity, self.language_model = activity, language_model
        self.micro_rows = self._configured_rows = config.compute.micro_batch_rows or config.batch_rows

    def modes(self) -> list[Mode]:
        return ["vanilla", "sparse"] if self.policy and self.clt.connected else ["vanilla"]

    def outcomes(self, activations: Activations, gradients: DecoderGradients | None = None) -> dict[Mode, Outcome]:
        """Both modes' passes over `activations`. `gradients` gathers the decoders' gradient in place of their
        `.grad`."""
        return {mode: self._outcome(mode, activations, gradients) for mode in self.modes()}

    def _outcome(self, mode: Mode, activations: Activations, gradients: DecoderGradients | None) -> Outcome:
        c, backend = self.config.loss, self.config.compute.backend
        forward = self.clt(activations, mode, backend=backend, gradients=gradients)
        outcome = Outcome({site: forward.output(site) for site in self.clt.sites}, forward.latents)
        dead = self.activity[mode].dead(c.dead_after_tokens)
        if c.aux_weight and dead.any():
            outcome.explained = losses.written_by_dead(forward, dead, c.aux_latents)
        if c.cross_entropy_weight:
            hooks = replacement(self.clt, mode, backend, gradients=gradients)
            outcome.cross_entropy = self.language_model.cross_entropy(activations.tokens, **hooks)
        return outcome

    def terms(self, outcomes: dict[Mode, Outcome], activations: Activations, means: Means) -> dict[str, Term]:
        """The terms of the loss, of the rows that `activations` holds. `means` [D]: of each site's real output, over
        all rows of the batch."""
        real = losses.targets(self.clt, activations)
        terms: dict[str, Term] = {}
        for mode, outcome in outcomes.items():
            terms |= self._terms_of_mode(mode, outcome, real, means)
        if self.policy and "sparse" in outcomes:
            c, pairs = self.config, zip(outcomes["sparse"].latents, outcomes["vanilla"].latents, strict=True)
            agreement = [losses.latents_unexplained(z, target, c.clt.latents) for z, target in pairs]
            terms["latent_agreement"] = Term("sparse", c.loss.latent_agreement_weight, agreement)
        return terms

    def _terms_of_mode(
        self, mode: Mode, outcome: Outcome, real: dict[Site, Tensor], means: Means
    ) -> Iterator[tuple[str, Term]]:
        """FVU of every site, AuxK, cross-entropy."""
        c, outputs = self.config.loss, outcome.outputs
        for site in self.clt.sites:
            yield f"fvu_{mode}/{site.name}", Term(mode, 1, [losses.unexplained(real[site], outputs[site], means[site])])
        if outcome.explained:
            yield f"aux_{mode}", Term(mode, c.aux_weight, losses.aux_k(outcome.explained, outputs, real))
        if outcome.cross_entropy is not None:
            total = losses.Total(outcome.cross_entropy * real[self.clt.sites[0]].shape[0])
            yield f"cross_entropy_{mode}", Term(mode, c.cross_entropy_weight, [total])

    def means(self, activations: Activations) -> Means:
        return {site: y.mean(0) for site, y in losses.targets(self.clt, activations).items()}

    def loss(self, terms: dict[str, Term], tokens: int, rho: float) -> tuple[Tensor, Values]:
        """The loss of a batch of so many tokens, and its terms by name. `rho`: weight of the sparsely-connected
        terms."""
        values = {name: term.value(tokens) for name, term in terms.items()}
        weights = {name: term.weight * (rho if term.mode == "sparse" else 1) for name, term in terms.items()}
        pressure = self.policy.pressure(self.clt) if self.policy and "sparse" in self.modes() else None
        if pressure is not None:
            values["pressure"], weights["pressure"] = pressure, rho
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return total, values | {"loss": total}

    def backward(self, activations: Activations, rho: float, check: Callable[[Tensor, Values], None]) -> Backward:
        """The gradient of a batch's loss; the encoders' and biases' in `.grad`. `rho`: weight of the
        sparsely-connected terms. `check(loss, terms)` may raise before anything is differentiated.

        Where memory runs out, the same once more in micro-batches of half as many rows, which is then how the run
        goes on.
        """
        try:
            return self._backward(activations, rho, check)
        except Exception as error:
            halved = self.micro_rows < self._configured_rows
            if halved or self.micro_rows == 1 or not is_out_of_memory(error):
                raise
        # Behind the handler, which keeps the tensors of the step alive.
        self.clt.zero_grad(set_to_none=True)
        if activations.r_0.is_cuda:
            torch.cuda.empty_cache()
        self.micro_rows = (self.micro_rows + 1) // 2
        warnings.warn(
            f"out of memory; going on in micro-batches of {self.micro_rows} rows, with the same gradients", stacklevel=2
        )
        return self._backward(activations, rho, check)

    def _backward(self, activations: Activations, rho: float, check: Callable[[Tensor, Values], None]) -> Backward:
        """The loss is one of the whole batch: variances and means over its tokens stand in it. Micro-batches
        therefore run twice: once without a graph, for the sums over tokens that the loss is made of; then, the
        gradient with respect to these being known, once more to carry it back (as in GradCache: Gao et al., 2021,
        which carries it to representations). The gradient is that of the whole batch, up to rounding.
        """
        gradients, means = DecoderGradients(self.clt, self.config.compute.backend), self.means(activations)
        tokens, parts = activations.tokens.numel(), activations.split(self.micro_rows)
        if len(parts) == 1:
            outcomes = self.outcomes(activations, gradients)
            total, values = self.loss(self.terms(outcomes, activations, means), tokens, rho)
            check(total, values)
            total.backward()
            return Backward(gradients, _numbers(values), _latents(outcomes))
        with torch.no_grad():
            runs = (self.terms(self.outcomes(part), part, means) for part in parts)
            terms = reduce(_added, runs)
        leaves = [tensor.requires_grad_() for term in terms.values() for tensor in term.tensors()]
        total, values = self.loss(terms, tokens, rho)
        check(total, values)
        total.backward()
        latents = []
        for part in parts:
            outcomes = self.outcomes(part, gradients)
            sums = [s for term in self.terms(outcomes, part, means).values() for s in term.tensors()]
            latents.append(_latents(outcomes))
            del outcomes
            carried = [s.requires_grad for s in sums]
            torch.autograd.backward(list(compress(sums, carried)), [leaf.grad for leaf in compress(leaves, carried)])
        return Backward(gradients, _numbers(values), _joined(latents))


def _added(terms: dict[str, Term], more: dict[str, Term]) -> dict[str, Term]:
    return {
        name: term.with_tensors(a + b for a, b in zip(term.tensors(), more[name].tensors(), strict=True))
        for name, term in terms.items()
    }


def _numbers(values: Values) -> Values:
    return {name: value.detach() for name, value in values.items()}


def _latents(outcomes: dict[Mode, Outcome]) -> dict[Mode, list[Latents]]:
    return {mode: [Latents(z.values.detach(), z.indices) for z in o.latents] for mode, o in outcomes.items()}


def _joined(parts: list[dict[Mode, list[Latents]]]) -> dict[Mode, list[Latents]]:
    """All rows' latents."""
    return {
        mode: [
            Latents(*map(torch.cat, zip(*same, strict=True)))
            for same in zip(*(part[mode] for part in parts), strict=True)
        ]
        for mode in parts[0]
    }
