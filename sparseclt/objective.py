"""The training loss of a batch, and its gradient: all rows at once, or a micro-batch of rows at a time."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from sparseclt import losses
from sparseclt.activity import Activity
from sparseclt.capture import Activations
from sparseclt.config import TrainConfig
from sparseclt.connections import ConnectionPolicy
from sparseclt.decoder_gradients import DecoderGradients
from sparseclt.evaluation import replacement
from sparseclt.language_model import LanguageModel
from sparseclt.memory import is_out_of_memory
from sparseclt.model import SparseCLT
from sparseclt.modules import Latents
from sparseclt.sites import Mode, Site

Terms = dict[str, Tensor]


@dataclass
class Outcome:
    """What the loss reads of one mode's pass over some rows."""

    outputs: dict[Site, Tensor]  # [N, D] reconstructions
    latents: list[Latents]  # one a module
    explained: dict[Site, Tensor] = field(default_factory=dict)  # [N, D] what dead latents would write, for AuxK
    cross_entropy: Tensor | None = None  # of the replaced model, a mean over tokens

    def differentiable(self) -> list[Tensor]:
        """All that the loss has a gradient for, in a fixed order."""
        tensors = [*self.outputs.values(), *(z.values for z in self.latents), *self.explained.values()]
        return tensors if self.cross_entropy is None else [*tensors, self.cross_entropy]


class Backward(NamedTuple):
    """What a backward pass leaves: decoder gradients, the loss terms, and each mode's latents."""

    gradients: DecoderGradients
    terms: Terms
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
        self.micro_rows = self._configured_rows = config.micro_batch_rows or config.batch_rows

    def modes(self) -> list[Mode]:
        return ["vanilla", "sparse"] if self.policy and self.clt.connected else ["vanilla"]

    def outcomes(self, activations: Activations, gradients: DecoderGradients | None = None) -> dict[Mode, Outcome]:
        """Both modes' passes over `activations`. `gradients` gathers the decoders' gradient in place of their
        `.grad`."""
        return {mode: self._outcome(mode, activations, gradients) for mode in self.modes()}

    def _outcome(self, mode: Mode, activations: Activations, gradients: DecoderGradients | None) -> Outcome:
        c, backend = self.config.loss, self.config.backend
        forward = self.clt(activations, mode, backend=backend, gradients=gradients)
        outcome = Outcome({site: forward.output(site) for site in self.clt.sites}, forward.latents)
        dead = self.activity[mode].dead(c.dead_after)
        if c.aux and dead.any():
            outcome.explained = losses.written_by_dead(forward, dead, c.aux_active)
        if c.cross_entropy:
            hooks = replacement(self.clt, mode, backend, gradients=gradients)
            outcome.cross_entropy = self.language_model.cross_entropy(activations.tokens, **hooks)
        return outcome

    def loss(self, outcomes: dict[Mode, Outcome], real: dict[Site, Tensor], rho: float) -> tuple[Tensor, Terms]:
        """The loss of a batch and its terms by name. `rho`: weight of the sparsely-connected terms."""
        total, terms = self._mode_loss("vanilla", outcomes["vanilla"], real)
        if self.policy and "sparse" in outcomes:
            sparse, sparse_terms = self._mode_loss("sparse", outcomes["sparse"], real)
            terms |= sparse_terms
            pairs = zip(outcomes["sparse"].latents, outcomes["vanilla"].latents, strict=True)
            agreement = [losses.latent_fvu(z, target, self.config.clt.latents) for z, target in pairs]
            terms["latent_agreement"] = torch.stack(agreement).sum()
            sparse = sparse + self.config.loss.latent_agreement * terms["latent_agreement"]
            pressure = self.policy.pressure(self.clt)
            if pressure is not None:
                terms["pressure"] = pressure
                sparse = sparse + pressure
            total = total + rho * sparse
        terms["loss"] = total
        return total, terms

    def _mode_loss(self, mode: Mode, outcome: Outcome, real: dict[Site, Tensor]) -> tuple[Tensor, Terms]:
        """What one mode adds to the loss: FVU of every site, AuxK, cross-entropy; and the terms by name."""
        c, outputs = self.config.loss, outcome.outputs
        terms = {f"fvu_{mode}/{site.name}": losses.fvu(real[site], outputs[site]) for site in self.clt.sites}
        total = torch.stack(list(terms.values())).sum()
        if outcome.explained:
            terms[f"aux_{mode}"] = losses.aux_k(outcome.explained, outputs, real)
            total = total + c.aux * terms[f"aux_{mode}"]
        if outcome.cross_entropy is not None:
            terms[f"cross_entropy_{mode}"] = outcome.cross_entropy
            total = total + c.cross_entropy * outcome.cross_entropy
        return total, terms

    def backward(self, activations: Activations, rho: float, check: Callable[[Tensor, Terms], None]) -> Backward:
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

    def _backward(self, activations: Activations, rho: float, check: Callable[[Tensor, Terms], None]) -> Backward:
        """The loss is one of the whole batch: variances and means over its tokens stand in it. Micro-batches
        therefore run twice: once without a graph, for what the loss reads; then, the gradient with respect to that
        being known, once more to carry it back (as in GradCache: Gao et al., 2021). The gradient is that of the whole
        batch, up to rounding.
        """
        gradients = DecoderGradients(self.clt, self.config.backend)
        real = losses.targets(self.clt, activations)
        parts = activations.split(self.micro_rows)
        if len(parts) == 1:
            outcomes = self.outcomes(activations, gradients)
            total, terms = self.loss(outcomes, real, rho)
            check(total, terms)
            total.backward()
            return Backward(gradients, _numbers(terms), _latents(outcomes))
        shares = [len(part.tokens) / len(activations.tokens) for part in parts]
        with torch.no_grad():
            runs = [self.outcomes(part) for part in parts]
        outcomes = {mode: _joined([run[mode] for run in runs], shares) for mode in runs[0]}
        del runs
        total, terms = self.loss(outcomes, real, rho)
        check(total, terms)
        total.backward()
        grads = {mode: [leaf.grad for leaf in outcome.differentiable()] for mode, outcome in outcomes.items()}
        numbers, latents = _numbers(terms), _latents(outcomes)
        del outcomes, total, terms  # and with their graph, the joined rows
        start = 0
        for part, share in zip(parts, shares, strict=True):
            stop = start + part.tokens.numel()
            for mode, outcome in self.outcomes(part, gradients).items():
                _carry_back(outcome.differentiable(), grads[mode], slice(start, stop), share)
            start = stop
        return Backward(gradients, numbers, latents)


def _joined(parts: list[Outcome], shares: list[float]) -> Outcome:
    """The parts' rows as one outcome, whose tensors are leaves. `shares`: of the rows, by part."""

    def leaf(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors).requires_grad_()

    first = parts[0]
    latents = [
        Latents(leaf([z.values for z in same]), torch.cat([z.indices for z in same]))
        for same in zip(*(part.latents for part in parts), strict=True)
    ]
    by_site = ({site: leaf([getattr(part, name)[site] for part in parts]) for site in getattr(first, name)}
               for name in ("outputs", "explained"))  # fmt: skip
    joined = Outcome(next(by_site), latents, next(by_site))
    entropies = [part.cross_entropy for part in parts if part.cross_entropy is not None]
    if entropies:
        joined.cross_entropy = sum(e * s for e, s in zip(entropies, shares, strict=True)).requires_grad_()  # type: ignore[union-attr]
    return joined


def _carry_back(part: list[Tensor], grads: list[Tensor | None], tokens: slice, share: float) -> None:
    """Backward through the graph of a micro-batch, given the gradient of all tokens' results."""
    pairs = [
        (tensor, grad * share if grad.ndim == 0 else grad[tokens])
        for tensor, grad in zip(part, grads, strict=True)
        if grad is not None and tensor.requires_grad
    ]
    torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])


def _numbers(terms: Terms) -> Terms:
    return {name: term.detach() for name, term in terms.items()}


def _latents(outcomes: dict[Mode, Outcome]) -> dict[Mode, list[Latents]]:
    return {mode: [Latents(z.values.detach(), z.indices) for z in o.latents] for mode, o in outcomes.items()}
