"""Which connections a sparsely-connected CLT keeps: policies that choose them and change them during training."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from sparseclt.config import ConnectionConfig, Importance
from sparseclt.connections.activity import Activity
from sparseclt.connections.selection import random_connections, select_top_connections
from sparseclt.model.transcoders import Transcoders


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
        return LearnedConnections(None, pressure=config.pressure_weight, importance=config.importance, backend=backend)
    check_connections(clt, config.per_latent, least=1 if config.policy == "learned" else 0)
    if config.policy == "random":
        return RandomConnections(config.per_latent)
    if config.policy == "learned":
        return LearnedConnections(
            config.per_latent, pressure=config.pressure_weight, start_step=config.candidates_after_steps,
            importance=config.importance, backend=backend,
        )  # fmt: skip
    return TopConnections(
        config.per_latent, start=config.start_per_latent, anneal_steps=round(config.anneal_share * steps),
        refresh_every=config.refresh_steps, freeze_at=round(config.freeze_after_share * steps),
        importance=config.importance, backend=backend,
    )  # fmt: skip


class ConnectionPolicy(ABC):
    """Chooses connections at the start of a step when they are due."""

    def prepare(self, clt: Transcoders) -> None:  # noqa: B027  most policies train nothing of their own
        """Give the modules the parameters that the policy trains, before an optimiser is made."""

    @abstractmethod
    def update(self, clt: Transcoders, activity: Activity, step: int) -> bool:
        """Choose connections anew where `step` asks for it; returns whether it did."""

    def pressure(self, clt: Transcoders) -> Tensor | None:
        """The loss term that closes connections, if the policy has one."""
        return None


class TopConnections(ConnectionPolicy):
    """The C most important upstream latents of each latent (`select_top_connections`), chosen anew every
    `refresh_every` steps.

    C falls geometrically from `start` to `per_latent` until step `anneal_steps`. From step `freeze_at` on the
    connections stay as they are, so that the weights settle.
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
        backend: str | None = None,
    ):
        self.per_latent, self.start = per_latent, start or per_latent
        self.anneal_steps, self.refresh_every, self.freeze_at = anneal_steps, refresh_every, freeze_at
        self.importance, self.backend = importance, backend
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
        clt.connect(select_top_connections(clt, activity, self.at(step), self.importance, self.backend))
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


class LearnedConnections(ConnectionPolicy):
    """A logit for each candidate connection: open where it is positive, with the sigmoid's gradient.

    An L1 pressure on the probabilities closes connections; how many stay is an outcome. The candidates are the
    `candidates` most important upstream latents of each latent, chosen once at `start_step`; or, with
    `candidates=None`, all of them: the post's dense F x U mask, for small models. Logits start at
    N(0.1, 0.001^2) and stay in fp32.
    """

    def __init__(
        self,
        candidates: int | None,
        *,
        pressure: float = 1.0,
        start_step: int = 0,
        importance: Importance = "coactivation",
        backend: str | None = None,
    ):
        self.candidates, self.weight, self.start_step = candidates, pressure, start_step
        self.importance, self.backend = importance, backend

    def prepare(self, clt: Transcoders) -> None:
        for module in clt:
            if module.upstream:
                slots = module.upstream if self.candidates is None else min(self.candidates, module.upstream)
                # Of all latents: each rank of several takes its own out of the same numbers.
                logits = torch.empty(module.latents, slots, device=module.W_enc.device).normal_(0.1, 0.001)
                module.logits = nn.Parameter(logits if module.group.alone else logits[module.rows].clone())

    def update(self, clt: Transcoders, activity: Activity, step: int) -> bool:
        if clt.connected or step < self.start_step or (self.candidates is not None and not activity.weight):
            return False
        most = max(module.upstream for module in clt)
        clt.connect(select_top_connections(clt, activity, self.candidates or most, self.importance, self.backend))
        return True

    def pressure(self, clt: Transcoders) -> Tensor | None:
        """The expected number of open connections of a latent, averaged over modules, times the weight."""
        probabilities = [torch.sigmoid(m.logits).sum(1).mean() for m in clt if m.logits is not None]
        return self.weight * torch.stack(probabilities).mean() if probabilities else None
