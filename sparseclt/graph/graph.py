"""A graph: nodes with values, edges with coefficients, and what follows from them linearly."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from sparseclt.model.sites import Site

NodeKind = Literal["latent", "error", "attention", "layers", "embedding", "bias", "logit"]
INPUTS: tuple[NodeKind, ...] = ("embedding", "attention", "error", "layers")  # nothing leads to them


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    `kind`: "latent"; "error" (what a module fails to reconstruct, or the model's own output where a token has no
    latents); "attention" (the model's own attention output, taken as given); "layers" (all that layers behind the
    covered ones write); "embedding"; "bias" (all biases together); "logit".
    """

    kind: NodeKind
    position: int
    """Of its token in the prompt; 0 for the bias."""
    index: int = -1
    """The latent within its module; the token id of an embedding or a logit."""
    site: Site | None = None
    """Of a latent, an error or frozen attention."""

    def __str__(self) -> str:
        if self.kind == "latent":
            assert self.site is not None
            return f"{self.site.name}/{self.index}@{self.position}"
        if self.kind == "bias":
            return "bias"
        place = f" {self.site.name}" if self.site else ""
        return f"{self.kind}{place}@{self.position}"


@dataclass(frozen=True)
class Graph:
    """Everything that the pre-activations of active latents, and the top logits, are sums of.

    `nodes` are ordered: latents, module by module, then what is given, the bias, and the logits. An edge adds
    `coefficient` times the value of its `source` to its `target`; the edges that lead to a latent add up to its
    value, those that lead to a logit to that logit minus the mean over the vocabulary. The value of a given node is 1.
    """

    tokens: Tensor  # [S]
    nodes: tuple[Node, ...]
    values: Tensor  # [n] float64
    source: Tensor  # [E] node numbers
    target: Tensor  # [E]
    coefficient: Tensor  # [E] float64
    stage: Tensor  # [n] -1 for nodes that nothing leads to, then the number of the module, at last the logits
    probabilities: Tensor  # [k] of the logits, over the whole vocabulary

    @property
    def weight(self) -> Tensor:
        """What each edge adds to its target, [E]: coefficient times the value of its source."""
        return self.coefficient * self.values[self.source]

    @cached_property
    def by_kind(self) -> dict[str, Tensor]:
        """Of each kind of node, which nodes are of it: [n] bool."""
        kinds = [node.kind for node in self.nodes]
        return {kind: torch.tensor([k == kind for k in kinds]) for kind in {*kinds, *INPUTS, "latent", "logit", "bias"}}

    def numbers(self, kind: NodeKind) -> Tensor:
        """The numbers of the nodes of one kind."""
        return self.by_kind[kind].nonzero()[:, 0]

    def number_of(self, site: Site, position: int, latent: int) -> int | None:
        """The number of a latent's node; None if it is not in the graph."""
        return self._latents.get((site, position, latent))

    @cached_property
    def _latents(self) -> dict[tuple[Site | None, int, int], int]:
        nodes = enumerate(self.nodes)
        return {(node.site, node.position, node.index): n for n, node in nodes if node.kind == "latent"}

    @cached_property
    def edges_by_stage(self) -> list[Tensor]:
        """Edge numbers by the stage of their target, in the order of computation."""
        stages = self.stage[self.target]
        return [(stages == stage).nonzero()[:, 0] for stage in stages.unique().tolist()]

    def propagate(self, held: Mapping[int, float]) -> Tensor:
        """The values [n] that follow along the edges if the nodes `held` have the values given there.

        Linear: norm scales, attention and the choice of active latents stay as they are, and a value may come out
        negative. With `held` empty, the graph's own values follow from its inputs.
        """
        values = self.values.clone()
        values[[*held]] = torch.tensor([*held.values()], dtype=values.dtype, device=values.device)
        fixed = torch.zeros_like(values, dtype=torch.bool)
        fixed[[*held]] = True
        for edges in self.edges_by_stage:
            target = self.target[edges]
            sums = torch.zeros_like(values).index_add_(0, target, self.coefficient[edges] * values[self.source[edges]])
            reached = torch.zeros_like(fixed)
            reached[target] = True
            values = torch.where(reached & ~fixed, sums, values)
        return values
