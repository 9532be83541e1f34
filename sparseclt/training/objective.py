"""The training loss of a batch, and its gradient: all rows at once, or a micro-batch of rows at a time."""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import compress
from typing import NamedTuple

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.connections.policies import ConnectionPolicy
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.modules import Latents
from sparseclt.model.over_ranks import counted_by_all
from sparseclt.model.replacement import replacement
from sparseclt.model.sites import Mode, Site
from sparseclt.parallel import Group, sum_over
from sparseclt.training import losses
from sparseclt.training.interactions import jacobian_sums
from sparseclt.training.losses import LossTerm
from sparseclt.training.memory import is_out_of_memory

Values = dict[str, Tensor]
Means = dict[Site, Tensor]
Check = Callable[[Tensor, Values], None]


@dataclass
class ModePass:
    """One mode's pass over some rows, as far as the loss reads it."""

    outputs: dict[Site, Tensor]  # [N, D] reconstructions
    latents: list[Latents]  # one entry per module
    l0: list[Tensor]  # [N] per module, with a gradient; empty except with JumpReLU
    cross_entropy: Tensor | None = None  # of the replaced model, a mean over tokens
    jacobian: Sequence[Tensor] = ()  # per MLP reader, a sum over tokens; only of vanilla mode, if it is penalised

    def detached_latents(self) -> list[Latents]:
        """The latents without their graph."""
        return [Latents(z.values.detach(), z.indices) for z in self.latents]


class BackwardResult(NamedTuple):
    """The result of a backward pass: decoder gradients, the loss terms, each mode's latents, and, if the policy
    asks for them, the gradients [N, K] of those of sparsely-connected mode."""

    gradients: DecoderGradients
    terms: Values
    latents: dict[Mode, list[Latents]]
    of_latents: list[Tensor]


class Objective:
    """The loss of both modes, as a function of weights and connections."""

    def __init__(
        self,
        config: TrainConfig,
        clt: SparseCLT,
        policy: ConnectionPolicy | None,
        language_model: LanguageModel,
    ):
        self.config, self.clt, self.policy, self.language_model = config, clt, policy, language_model
        self.micro_rows = self._configured_rows = config.compute.micro_batch_rows or config.batch_rows

    def modes(self) -> list[Mode]:
        """The modes that are trained at this point of the run."""
        return ["vanilla", "sparse"] if self.policy and self.clt.connected else ["vanilla"]

    def passes(self, activations: Activations, gradients: DecoderGradients | None = None) -> dict[Mode, ModePass]:
        """Both modes' passes over `activations`. `gradients` collects the decoders' gradient instead of their
        `.grad`."""
        return {mode: self._pass(mode, activations, gradients) for mode in self.modes()}

    def _pass(self, mode: Mode, activations: Activations, gradients: DecoderGradients | None) -> ModePass:
        c, backend = self.config.loss, self.config.compute.backend
        forward = self.clt(activations, mode, backend=backend, gradients=gradients)
        result = ModePass({site: forward.output(site) for site in self.clt.sites}, forward.latents, forward.l0)
        if c.interaction_weight and mode == "vanilla":
            result.jacobian = jacobian_sums(self.clt, forward.latents, activations)
        if c.cross_entropy_weight:
            hooks = replacement(self.clt, mode, backend, gradients=gradients)
            result.cross_entropy = self.language_model.cross_entropy(activations.tokens, **hooks)
        return result

    def terms(self, passes: dict[Mode, ModePass], activations: Activations, means: Means) -> dict[str, LossTerm]:
        """The terms of the loss for the rows in `activations`. `means` [D]: of each site's real output, over all rows
        of the batch."""
        real = {site: self.clt.own_columns(y) for site, y in activations.outputs(self.clt.sites).items()}
        squares = {site: losses.squares_around(y, means[site], activations.counted_flat) for site, y in real.items()}
        terms: dict[str, LossTerm] = {}
        for mode, result in passes.items():
            terms |= self._terms_of_mode(mode, result, activations, real, squares)
        if self.policy and "sparse" in passes:
            c, pairs = self.config, zip(passes["sparse"].latents, passes["vanilla"].latents, strict=True)
            agreement = [
                losses.latent_fvu_sums(self._share(z), self._share(target), c.clt.latents) for z, target in pairs
            ]
            terms["latent_agreement"] = LossTerm("sparse", c.loss.latent_agreement_weight, agreement)
        return terms

    def _terms_of_mode(
        self,
        mode: Mode,
        result: ModePass,
        activations: Activations,
        real: dict[Site, Tensor],
        squares: dict[Site, Tensor],
    ) -> Iterator[tuple[str, LossTerm]]:
        """FVU of every site, L0, the Jacobian between latents, cross-entropy."""
        c, outputs = self.config.loss, result.outputs
        for site in self.clt.sites:
            sums = losses.fvu_sums(real[site], outputs[site], squares[site])
            yield f"fvu_{mode}/{site.name}", LossTerm(mode, 1, [sums])
        if result.l0 and c.l0_weight:
            a = self.clt.architecture
            L0s = [
                losses.L0Sum(l0[self._tokens_of(len(l0))].sum() / a.active_of(site.layer))
                for l0, site in zip(result.l0, self.clt.sites, strict=True)
            ]
            yield f"l0_penalty_{mode}", LossTerm(mode, c.l0_weight, L0s)
        if result.jacobian:
            # Weighted as a term of sparsely-connected mode: it comes in when that does.
            jacobians = [losses.TokenSum(total) for total in result.jacobian]
            yield "interaction", LossTerm("sparse", c.interaction_weight, jacobians)
        if result.cross_entropy is not None:
            total = losses.TokenSum(result.cross_entropy * activations.counted_tokens / self.clt.ranks.latents.size)
            yield f"cross_entropy_{mode}", LossTerm(mode, c.cross_entropy_weight, [total])

    def _tokens_of(self, N: int) -> slice:
        """The tokens, of N that all ranks have alike, that this rank's share of a sum is over."""
        group = self.clt.ranks.latents
        return slice(N * group.rank // group.size, N * (group.rank + 1) // group.size)

    def _share(self, latents: Latents) -> Latents:
        return Latents(*(tensor[self._tokens_of(len(tensor))] for tensor in latents))

    def means(self, activations: Activations) -> Means:
        """The mean [D] of each site's real output, over the tokens of the whole batch that count; this rank's columns
        of it."""
        counted, clt = activations.counted_flat, self.clt
        means = {site: losses.mean_over(activations.output(site), counted, clt.ranks.data) for site in clt.sites}
        return {site: clt.own_columns(mean) for site, mean in means.items()}

    def tokens(self, activations: Activations) -> int:
        """How many tokens of the whole batch count."""
        return counted_by_all(activations, self.clt.ranks.data)

    def loss(self, terms: dict[str, LossTerm], tokens: int, rho: float) -> tuple[Tensor, Values]:
        """The loss of a batch of so many tokens, and its terms by name. `rho`: weight of the sparsely-connected
        terms. `terms`: this rank's parts of the sums that they are made of."""
        terms = _added_up(terms, self.clt.ranks.world)
        values = {name: term.value(tokens) for name, term in terms.items()}
        weights = {name: term.weight * (rho if term.mode == "sparse" else 1) for name, term in terms.items()}
        pressure = self.policy.pressure(self.clt) if self.policy and "sparse" in self.modes() else None
        if pressure is not None:
            world = self.clt.ranks.world
            values["pressure"], weights["pressure"] = sum_over(pressure / world.size, world), rho
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return total, values | {"loss": total}

    def backward(self, activations: Activations, rho: float, check: Check) -> BackwardResult:
        """The gradient of a batch's loss; encoders and biases get theirs in `.grad`. `rho`: weight of the
        sparsely-connected terms. `check(loss, terms)` may raise before anything is differentiated.

        If memory runs out, it is tried once more in micro-batches of half as many rows, and the run stays with those;
        except with BatchTopK, which needs the whole batch.
        """
        try:
            return self._backward(activations, rho, check)
        except Exception as error:
            halved = self.micro_rows < self._configured_rows
            whole = self.clt.architecture.activation == "batchtopk"  # chooses the latents of all rows at once
            several = not self.clt.ranks.world.alone  # of which the others would wait for this one
            if several or whole or halved or self.micro_rows == 1 or not is_out_of_memory(error):
                raise
        # Not inside the handler, which keeps the tensors of the failed step alive.
        self.clt.zero_grad(set_to_none=True)
        gc.collect()  # what the failed step left in circles of references
        if activations.r_0.is_cuda:
            torch.cuda.empty_cache()
        self.micro_rows = (self.micro_rows + 1) // 2
        warnings.warn(
            f"out of memory; going on in micro-batches of {self.micro_rows} rows, with the same gradients", stacklevel=2
        )
        return self._backward(activations, rho, check)

    def _backward(self, activations: Activations, rho: float, check: Check) -> BackwardResult:
        parts = activations.split(self.micro_rows)
        if len(parts) == 1:
            return self._backward_at_once(activations, rho, check)
        return self._backward_in_parts(activations, parts, rho, check)

    def _backward_at_once(self, activations: Activations, rho: float, check: Check) -> BackwardResult:
        gradients, means = DecoderGradients(self.clt, self.config.compute.backend), self.means(activations)
        passes = self.passes(activations, gradients)
        # Without a name: kept through the backward pass, the terms would keep its reconstructions, too.
        total, values = self.loss(self.terms(passes, activations, means), self.tokens(activations), rho)
        check(total, values)
        watched = self._watched(passes)
        total.backward()
        latents = {mode: result.detached_latents() for mode, result in passes.items()}
        return BackwardResult(gradients, _numbers(values), latents, _gradients(watched))

    def _watched(self, passes: dict[Mode, ModePass]) -> list[Tensor]:
        """The values of the latents of sparsely-connected mode, whose gradient the backward pass is to keep; none if
        the policy does not ask for them."""
        if self.policy is None or not self.policy.reads_gradients or "sparse" not in passes:
            return []
        values = [z.values for z in passes["sparse"].latents]
        for tensor in values:
            tensor.retain_grad()
        return values

    def _backward_in_parts(
        self, activations: Activations, parts: list[Activations], rho: float, check: Check
    ) -> BackwardResult:
        """The loss belongs to the whole batch: it has variances and means over all its tokens. Micro-batches therefore
        run twice: once without a graph, for the sums over tokens that the loss is made of; then, once the gradient with
        respect to these sums is known, again to carry it back (as in GradCache: Gao et al., 2021, which carries it to
        representations). The gradient is that of the whole batch, up to rounding.
        """
        gradients, means = DecoderGradients(self.clt, self.config.compute.backend), self.means(activations)
        with torch.no_grad():
            runs = (self.terms(self.passes(part, gradients), part, means) for part in parts)
            terms = reduce(_added, runs)
        leaves = [tensor.requires_grad_() for term in terms.values() for tensor in term.tensors()]
        total, values = self.loss(terms, self.tokens(activations), rho)
        check(total, values)
        total.backward()
        latents, of_latents = [], []
        for part in parts:
            passes = self.passes(part, gradients)
            watched = self._watched(passes)
            sums = [s for term in self.terms(passes, part, means).values() for s in term.tensors()]
            latents.append({mode: result.detached_latents() for mode, result in passes.items()})
            del passes
            carried = [s.requires_grad for s in sums]
            torch.autograd.backward(list(compress(sums, carried)), [leaf.grad for leaf in compress(leaves, carried)])
            of_latents.append(_gradients(watched))
        joined = [torch.cat(same) for same in zip(*of_latents, strict=True)]
        return BackwardResult(gradients, _numbers(values), _joined(latents), joined)


def _added_up(terms: dict[str, LossTerm], world: Group) -> dict[str, LossTerm]:
    """The terms with the sums of all ranks, of which each has a part; they are sent at once."""
    if world.alone:
        return terms
    parts = [tensor for term in terms.values() for tensor in term.tensors()]
    wide = reduce(torch.promote_types, (part.dtype for part in parts))
    total = sum_over(torch.cat([part.flatten().to(wide) for part in parts]), world).split([p.numel() for p in parts])
    sums = iter([own.view(part.shape).to(part.dtype) for own, part in zip(total, parts, strict=True)])
    return {name: term.with_tensors(sums) for name, term in terms.items()}


def _added(terms: dict[str, LossTerm], more: dict[str, LossTerm]) -> dict[str, LossTerm]:
    return {
        name: term.with_tensors(a + b for a, b in zip(term.tensors(), more[name].tensors(), strict=True))
        for name, term in terms.items()
    }


def _numbers(values: Values) -> Values:
    return {name: value.detach() for name, value in values.items()}


def _gradients(tensors: list[Tensor]) -> list[Tensor]:
    """What the backward pass kept; 0 where nothing reached a tensor."""
    return [torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in tensors]


def _joined(parts: list[dict[Mode, list[Latents]]]) -> dict[Mode, list[Latents]]:
    """All rows' latents."""
    return {
        mode: [
            Latents(*map(torch.cat, zip(*same, strict=True)))
            for same in zip(*(part[mode] for part in parts), strict=True)
        ]
        for mode in parts[0]
    }
