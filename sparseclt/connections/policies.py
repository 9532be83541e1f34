"""Which connections a sparsely-connected CLT keeps: policies that choose them and change them during training."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from sparseclt import ops
from sparseclt.config import ConnectionConfig, Importance
from sparseclt.connections.activity import Activity
from sparseclt.model.attention import head_rows
from sparseclt.model.clt import SparseCLT
from sparseclt.model.cross_layer import effective_decoders
from sparseclt.ops.rows import chunks
from sparseclt.ops.scratch import SELECTION_BYTES


def select_top_connections(
    clt: SparseCLT, activity: Activity, C: int, importance: Importance = "coactivation", backend: str | None = None
) -> list[Tensor | None]:
    """For every module the C upstream latents [F, C] that matter most to each of its latents.

    Importance of (i, j) is |V[i, j]| x s, over heads the root of the sum of squares for an attention reader. s is
    the running "mean" or "rms" of z_j, or with "coactivation" the mean of z_j over the tokens on which latent i
    fires; an attention reader, whose upstream latents lie on other tokens, then takes the plain mean.
    A module with fewer than C upstream latents keeps all of them; None without any. Streams tiles: nothing of size
    F x U is allocated.
    """
    chosen: list[Tensor | None] = [None] * len(clt.sites)
    decoders = [m.W_dec.detach() for m in clt]
    for reader, E in effective_decoders(clt.readers(), clt.sites, decoders):
        rows, keep = clt.reading_rows(reader.index).detach(), min(C, len(E))
        if importance == "coactivation" and reader.attention is None:
            parts = []
            for part in chunks(len(rows), len(E) * rows.element_size(), SELECTION_BYTES):
                s = activity.coactivation(reader.index, part, reader.upstream_modules).to(E.dtype)
                parts.append(ops.select_connections(rows[part], E, s, keep, backend=backend))
            chosen[reader.index] = torch.cat(parts)
            continue
        if reader.attention is not None:
            rows = torch.stack([head_rows(rows, reader.attention, h) for h in range(len(reader.attention.W_V))])
        magnitude = activity.magnitude("rms" if importance == "rms" else "mean")
        s = magnitude[: reader.upstream_modules].flatten().to(E.dtype)
        chosen[reader.index] = ops.select_connections(rows, E, s, keep, backend=backend)
    return chosen


def check_connections(clt: SparseCLT, C: int) -> None:
    """A ValueError where no module has C upstream latents, saying how many there are."""
    most = max(m.upstream for m in clt)
    if not 1 <= C <= most:
        raise ValueError(
            f"connections.per_latent: expected 1 to {most} (the upstream latents of the last module), got {C}"
        )


def make_policy(config: ConnectionConfig, clt: SparseCLT, steps: int, backend: str | None) -> "ConnectionPolicy | None":
    """The policy that `config` names for a run of `steps` steps; None: vanilla mode only."""
    if config.policy == "none" or not any(module.upstream for module in clt):
        return None
    if config.policy == "dense-learned":
        return LearnedConnections(None, pressure=config.pressure, importance=config.importance, backend=backend)
    check_connections(clt, config.per_latent)
    if config.policy == "learned":
        return LearnedConnections(
            config.per_latent, pressure=config.pressure, start_step=config.refresh_every,
            importance=config.importance, backend=backend,
        )  # fmt: skip
    return TopConnections(
        config.per_latent, start=config.start, anneal_steps=round(config.anneal * steps),
        refresh_every=config.refresh_every, freeze_at=round(config.freeze * steps),
        importance=config.importance, backend=backend,
    )  # fmt: skip


class ConnectionPolicy(ABC):
    """Chooses connections at the start of a step when they are due."""

    def prepare(self, clt: SparseCLT) -> None:  # noqa: B027  most policies train nothing of their own
        """Give the modules the parameters that the policy trains, before an optimiser is made."""

    @abstractmethod
    def update(self, clt: SparseCLT, activity: Activity, step: int) -> bool:
        """Choose connections anew where `step` asks for it; returns whether it did."""

    def pressure(self, clt: SparseCLT) -> Tensor | None:
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
            raise ValueError(f"connections.start: expected at least per_latent = {per_latent}, got {start}")
        if refresh_every < 1:
            raise ValueError(f"connections.refresh_every: expected at least 1, got {refresh_every}")

    def at(self, step: int) -> int:
        """C at `step`."""
        if step >= self.anneal_steps:
            return self.per_latent
        progress = step / self.anneal_steps
        return round(math.exp((1 - progress) * math.log(self.start) + progress * math.log(self.per_latent)))

    def update(self, clt: SparseCLT, activity: Activity, step: int) -> bool:
        frozen = self.freeze_at is not None and step > self.freeze_at
        if clt.connected and (frozen or step % self.refresh_every):
            return False
        if not activity.weight:
            return False
        clt.connect(select_top_connections(clt, activity, self.at(step), self.importance, self.backend))
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

    def prepare(self, clt: SparseCLT) -> None:
        for module in clt:
            if module.upstream:
                slots = module.upstream if self.candidates is None else min(self.candidates, module.upstream)
                logits = torch.empty(module.latents, slots, device=module.W_enc.device).normal_(0.1, 0.001)
                module.logits = nn.Parameter(logits)

    def update(self, clt: SparseCLT, activity: Activity, step: int) -> bool:
        if clt.connected or step < self.start_step or (self.candidates is not None and not activity.weight):
            return False
        most = max(module.upstream for module in clt)
        clt.connect(select_top_connections(clt, activity, self.candidates or most, self.importance, self.backend))
        return True

    def pressure(self, clt: SparseCLT) -> Tensor | None:
        """The expected number of open connections of a latent, averaged over modules, times the weight."""
        probabilities = [torch.sigmoid(m.logits).sum(1).mean() for m in clt if m.logits is not None]
        return self.weight * torch.stack(probabilities).mean() if probabilities else None
