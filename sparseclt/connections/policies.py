"""Which connections a sparsely-connected CLT keeps: policies that choose them and change them during training."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparseclt.config import Budget, ConnectionConfig, Importance
from sparseclt.connections.activity import Activity
from sparseclt.connections.exchange import exchanged_candidates
from sparseclt.connections.gradients import RecentGradients
from sparseclt.connections.selection import random_connections, select_top_connections
from sparseclt.model.activations import Activations
from sparseclt.model.modules import Latents
from sparseclt.model.transcoders import Transcoders
from sparseclt.parallel import ALONE, Group

FIRST_LOGIT = 0.1
FREE = 2  # connections of each latent without a price: latents that fire rarely would lose all of theirs, and die
STEERING = 0.02  # exponent with which the pressure follows, in each step, the connections that are too many
EXCHANGING = 0.75  # share of the steps up to the freeze in which candidates are exchanged: new gates need time to close
MOST_EXCESS = 4.0  # times the wanted number, beyond which the pressure rises no faster


def check_connections(clt: Transcoders, C: int, least: int = 0) -> None:
    """A ValueError for fewer connections than `least`, and where no module has C upstream latents, saying how many
    there are."""
    most = max(m.upstream for m in clt)
    if not least <= C <= most:
        raise ValueError(
            f"connections.per_latent: expected {least} to {most} (the upstream latents of the last module), got {C}"
        )


def make_policy(
    config: ConnectionConfig, clt: Transcoders, steps: int, backend: str | None
) -> "ConnectionPolicy | None":
    """The policy that `config` names for a run of `steps` steps; None: vanilla mode only."""
    if config.policy == "none" or not clt.reads_upstream:
        return None
    if config.policy == "dense-learned":
        return LearnedConnections(
            None, pressure=config.pressure_weight, open_per_latent=config.open_per_latent,
            importance=config.importance, backend=backend,
        )  # fmt: skip
    check_connections(clt, config.per_latent, least=1 if config.policy == "learned" else 0)
    if config.policy == "random":
        return RandomConnections(config.per_latent)
    if config.policy == "learned":
        return _learned(config, clt, steps, backend)
    return TopConnections(
        config.per_latent, start=config.start_per_latent, anneal_steps=round(config.anneal_share * steps),
        refresh_every=config.refresh_steps, freeze_at=round(config.freeze_after_share * steps),
        importance=config.importance, budget=config.budget, backend=backend,
    )  # fmt: skip


def _learned(config: ConnectionConfig, clt: Transcoders, steps: int, backend: str | None) -> "LearnedConnections":
    a, device = clt.architecture, clt.transcoder(0).W_enc.device
    last = round(EXCHANGING * config.freeze_after_share * steps)
    exchange = None
    if config.exchange_share:
        recent = RecentGradients(clt.sites, a.slots, config.recent_tokens, a.model.heads, device)
        exchange = CandidateExchange(recent, config.refresh_steps, last, config.exchange_share)
    return LearnedConnections(
        config.per_latent, pressure=config.pressure_weight, open_per_latent=config.open_per_latent,
        start_step=config.candidates_after_steps, exchange=exchange, importance=config.importance, backend=backend,
    )  # fmt: skip


class ConnectionPolicy(ABC):
    """Chooses connections at the start of a step when they are due."""

    reads_gradients = False  # whether `observe` is called in every step of sparsely-connected mode

    def prepare(self, clt: Transcoders) -> None:  # noqa: B027  most policies train nothing of their own
        """Give the modules the parameters that the policy trains, before an optimiser is made."""

    @abstractmethod
    def update(self, clt: Transcoders, activity: Activity, step: int) -> bool:
        """Choose connections anew where `step` asks for it; returns whether it did."""

    def observe(  # noqa: B027  most policies need to know no more than the activity of latents
        self,
        latents: Sequence[Latents],
        gradients: Sequence[Tensor],
        activations: Activations,
        data: Group = ALONE,
    ) -> None:
        """Take in a step's latents of sparsely-connected mode and the gradient [N, K] of its loss with respect to
        them, as it would be at full weight. With `data` those of the rows of all its ranks, while `activations` are of
        this rank's own."""

    def state(self) -> dict[str, Tensor]:
        """The tensors that change while the policy works, by name, to be saved, or copied into."""
        return {}

    def pressure(self, clt: Transcoders) -> Tensor | None:
        """The loss term that closes connections, if the policy has one."""
        return None


class TopConnections(ConnectionPolicy):
    """The C most important upstream latents of each latent (`select_top_connections`), chosen anew every
    `refresh_every` steps.

    C falls geometrically from `start` to `per_latent` until step `anneal_steps`. From step `freeze_at` on the
    connections stay as they are, so that the weights settle. With `budget` "module" a module's latents share theirs.
    """

    def __init__(
        self,
        per_latent: int,
        *,
        start: int | None = None,
        anneal_steps: int = 0,
        refresh_every: int = 50,
        freeze_at: int | None = None,
        importance: Importance = "coactivation",
        budget: Budget = "latent",
        backend: str | None = None,
    ):
        self.per_latent, self.start = per_latent, start or per_latent
        self.anneal_steps, self.refresh_every, self.freeze_at = anneal_steps, refresh_every, freeze_at
        self.importance, self.budget, self.backend = importance, budget, backend
        if self.start < per_latent:
            raise ValueError(f"connections.start_per_latent: expected at least per_latent = {per_latent}, got {start}")
        if not per_latent and self.start:
            raise ValueError(f"connections.start_per_latent: expected None with per_latent = 0, got {start}")
        if refresh_every < 1:
            raise ValueError(f"connections.refresh_steps: expected at least 1, got {refresh_every}")

    def at(self, step: int) -> int:
        """C at `step`."""
        if step >= self.anneal_steps or self.start == self.per_latent:
            return self.per_latent
        progress = step / self.anneal_steps
        return round(math.exp((1 - progress) * math.log(self.start) + progress * math.log(self.per_latent)))

    def update(self, clt: Transcoders, activity: Activity, step: int) -> bool:
        frozen = self.freeze_at is not None and step > self.freeze_at
        if clt.connected and (frozen or step % self.refresh_every):
            return False
        if not activity.weight:
            return False
        C = self.at(step)
        clt.connect(select_top_connections(clt, activity, C, self.importance, self.backend, self.budget))
        return True


class RandomConnections(ConnectionPolicy):
    """`per_latent` upstream latents of each latent, each as likely as any other, chosen once: the control of every
    other policy."""

    def __init__(self, per_latent: int):
        self.per_latent, self._seed = per_latent, 0

    def prepare(self, clt: Transcoders) -> None:
        """Draws the seed of the choice from torch's own generator, so that a resumed run chooses the same."""
        self._seed = int(torch.randint(2**31, ()))

    def update(self, clt: Transcoders, activity: Activity, step: int) -> bool:
        if clt.connected:
            return False
        clt.connect(random_connections(clt, self.per_latent, self._seed))
        return True


@dataclass
class CandidateExchange:
    """When and how candidates of learned connections are exchanged (`exchanged_candidates`): every `every` steps up to
    step `last`, at most a share `share` of those of each latent."""

    recent: RecentGradients
    every: int
    last: int
    share: float

    def due(self, step: int) -> bool:
        return step % self.every == 0 and step <= self.last and bool(self.recent.seen)


class LearnedConnections(ConnectionPolicy):
    """A logit for each candidate connection: open where it is positive, with the sigmoid's gradient.

    An L1 pressure on the probabilities, except the largest `FREE` of each latent, closes connections; how many stay is
    an outcome, unless `open_per_latent` says how many should, on average over latents: the pressure then rises while
    there are more and falls while there are fewer. The candidates are at first the `candidates` most important upstream
    latents of each latent, at `start_step`. With an `exchange`, closed ones then give way to those whose opening would
    lower the loss by more than it costs. With `candidates=None` all upstream latents are candidates, and none is free:
    the post's dense F x U mask, for small models. Logits start at N(0.1, 0.001^2), those of new candidates at 0.1, and
    stay in fp32.
    """

    def __init__(
        self,
        candidates: int | None,
        *,
        pressure: float = 1.0,
        open_per_latent: float | None = None,
        start_step: int = 0,
        exchange: CandidateExchange | None = None,
        importance: Importance = "coactivation",
        backend: str | None = None,
    ):
        self.candidates, self.start_step, self.exchange = candidates, start_step, exchange
        self.open_per_latent, self.importance, self.backend = open_per_latent, importance, backend
        self.weight = torch.tensor(pressure, dtype=torch.float64)
        self.reads_gradients = exchange is not None

    def prepare(self, clt: Transcoders) -> None:
        for module in clt:
            if module.upstream:
                slots = module.upstream if self.candidates is None else min(self.candidates, module.upstream)
                # Of all latents: each rank of several takes its own out of the same numbers.
                logits = torch.empty(module.latents, slots, device=module.W_enc.device).normal_(FIRST_LOGIT, 0.001)
                module.logits = nn.Parameter(logits if module.group.alone else logits[module.rows].clone())

    def update(self, clt: Transcoders, activity: Activity, step: int) -> bool:
        if clt.connected:
            self._steer(clt)
            if self.exchange is None or not self.exchange.due(step):
                return False
            self._exchange(clt, self.exchange)
            return True
        if step < self.start_step or (self.candidates is not None and not activity.weight):
            return False
        most = max(module.upstream for module in clt)
        clt.connect(select_top_connections(clt, activity, self.candidates or most, self.importance, self.backend))
        return True

    def _steer(self, clt: Transcoders) -> None:
        if self.open_per_latent is None:
            return
        counts = [m.group.sum_((m.logits > 0).sum()).double() / m.latents for m in clt if m.logits is not None]
        excess = float(torch.stack(counts).mean()) / self.open_per_latent
        self.weight *= min(max(excess, 1 / MOST_EXCESS), MOST_EXCESS) ** STEERING

    @torch.no_grad()
    def _exchange(self, clt: Transcoders, exchange: CandidateExchange) -> None:
        most = math.ceil(exchange.share * (self.candidates or 0))
        for module, chosen in zip(clt, exchanged_candidates(clt, exchange.recent, self.price(clt), most), strict=True):
            if chosen is not None and module.logits is not None:
                module.connect(chosen.connections)
                module.logits.masked_fill_(chosen.new, FIRST_LOGIT)

    def price(self, clt: Transcoders) -> float:
        """What the pressure charges for the whole probability of one connection."""
        return float(self.weight) / sum(m.latents for m in clt if m.logits is not None)

    def observe(
        self,
        latents: Sequence[Latents],
        gradients: Sequence[Tensor],
        activations: Activations,
        data: Group = ALONE,
    ) -> None:
        if self.exchange is not None:
            self.exchange.recent.add(latents, gradients, activations, data)

    def state(self) -> dict[str, Tensor]:
        recent = self.exchange.recent.state() if self.exchange is not None else {}
        return recent | ({} if self.open_per_latent is None else {"pressure": self.weight})

    def pressure(self, clt: Transcoders) -> Tensor | None:
        """The expected number of open connections of a latent beyond those that are free, averaged over modules, times
        the weight."""
        free = 0 if self.candidates is None else FREE
        numbers = []
        for logits in (module.logits for module in clt if module.logits is not None):
            open_ = torch.sigmoid(logits)
            charged = open_.sum(1) - open_.topk(min(free, logits.shape[1]), dim=1).values.sum(1)
            numbers.append(charged.mean())
        return float(self.weight) * torch.stack(numbers).mean() if numbers else None
