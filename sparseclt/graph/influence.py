"""Which nodes and edges matter for the logits, and how much of a graph its latents explain.

The definitions are circuit-tracer's (https://github.com/decoderesearch/circuit-tracer, `circuit_tracer/graph.py`). The
bias node takes no part, as circuit-tracer has none.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt.graph.graph import INPUTS, Graph


@dataclass(frozen=True)
class Pruned:
    """What pruning keeps of a graph."""

    nodes: Tensor  # [n] bool
    edges: Tensor  # [E] bool
    cumulative: Tensor  # [n] each node's place in the ranking by influence: the share of it and all before it


def normalised_edges(graph: Graph, nodes: Tensor | None = None) -> Tensor:
    """Each edge's share [E] of the absolute weight that leads to its target; 0 for edges of the bias.

    `nodes` [n] bool: only edges between these count.
    """
    weight = graph.weight.abs() * ~graph.by_kind["bias"][graph.source]
    if nodes is not None:
        weight = weight * (nodes[graph.source] & nodes[graph.target])
    total = torch.zeros_like(graph.values).index_add_(0, graph.target, weight)
    return weight / total[graph.target].clamp_min(1e-10)


def influence(graph: Graph, shares: Tensor) -> Tensor:
    """The influence [n] of every node on the logits.

    Equivalent to `p @ (A + A @ A + ...)` with A [target, source] the edges' `shares` and p the probabilities of the
    logits. The graph has no circles, so one walk from the logits backwards adds up the whole series.
    """
    weights = logit_weights(graph)
    result = torch.zeros_like(graph.values)
    for edges in reversed(graph.edges_by_stage):
        target = graph.target[edges]
        result.index_add_(0, graph.source[edges], shares[edges] * (result + weights)[target])
    return result


def logit_weights(graph: Graph) -> Tensor:
    """The probability of each logit, 0 for all other nodes: [n]."""
    weights = torch.zeros_like(graph.values)
    weights[graph.by_kind["logit"]] = graph.probabilities
    return weights


def prune(graph: Graph, node_share: float = 0.8, edge_share: float = 0.98) -> Pruned:
    """Keep the fewest nodes that have `node_share` of all influence, then the fewest edges between them with
    `edge_share` of theirs; embeddings, logits and the bias always stay.

    Raises ValueError for shares outside 0 to 1.
    """
    for name, share in {"node_share": node_share, "edge_share": edge_share}.items():
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: expected a share from 0 to 1, got {share}")
    node_influence = influence(graph, normalised_edges(graph))
    always = graph.by_kind["embedding"] | graph.by_kind["logit"] | graph.by_kind["bias"]
    nodes = (node_influence >= _threshold(node_influence, node_share)) | always
    shares = normalised_edges(graph, nodes)
    edge_influence = shares * (influence(graph, shares) + logit_weights(graph))[graph.target]
    edges = (edge_influence >= _threshold(edge_influence, edge_share)) & (edge_influence > 0)
    nodes, edges = _without_dead_ends(graph, nodes, edges, always)
    edges |= graph.by_kind["bias"][graph.source] & nodes[graph.target]
    return Pruned(nodes, edges, _cumulative(node_influence))


def _without_dead_ends(graph: Graph, nodes: Tensor, edges: Tensor, always: Tensor) -> tuple[Tensor, Tensor]:
    """Without nodes that lead nowhere, and latents that nothing leads to, until none is left."""
    latent = graph.by_kind["latent"]
    while True:
        edges = edges & nodes[graph.source] & nodes[graph.target]
        leads, led_to = torch.zeros_like(nodes), torch.zeros_like(nodes)
        leads[graph.source[edges]] = True
        led_to[graph.target[edges]] = True
        kept = nodes & (always | leads) & (~latent | led_to)
        if torch.equal(kept, nodes):
            return nodes, edges
        nodes = kept


def _threshold(scores: Tensor, share: float) -> float:
    """The smallest score among the largest ones that have `share` of the sum."""
    ranked = scores.sort(descending=True).values
    total = ranked.sum()
    if total == 0:
        return 0.0
    place = int(torch.searchsorted(ranked.cumsum(0) / total, share))
    return ranked[min(place, max(int((ranked > 0).sum()) - 1, 0))].item()


def _cumulative(scores: Tensor) -> Tensor:
    ranked, order = scores.sort(descending=True)
    return torch.zeros_like(scores).scatter_(0, order, ranked.cumsum(0) / ranked.sum().clamp_min(1e-300))


@dataclass(frozen=True)
class Scores:
    """How much of what leads to the logits the latents explain, from 0 to 1."""

    replacement: float
    """The share of the embeddings in the influence of embeddings and errors."""
    completeness: float
    """The share of what is not an error in all incoming edges, each node weighted by its influence."""
    input_shares: dict[str, float]
    """By kind of input ("embedding", "attention", "error", "layers"), its share of the influence of all inputs."""


def scores(graph: Graph) -> Scores:
    """circuit-tracer's scores; frozen attention counts as given, not as an error, and its share stands beside."""
    shares = normalised_edges(graph)
    reached = influence(graph, shares)
    by_input = {kind: reached[graph.by_kind[kind]].sum().item() for kind in INPUTS}
    inputs, explained = sum(by_input.values()), by_input["embedding"] + by_input["error"]
    from_errors = torch.zeros_like(reached).index_add_(0, graph.target, shares * graph.by_kind["error"][graph.source])
    output = reached + logit_weights(graph)
    return Scores(
        replacement=by_input["embedding"] / explained if explained else 1.0,
        completeness=(((1 - from_errors) * output).sum() / output.sum()).item(),
        input_shares={kind: value / inputs if inputs else 0.0 for kind, value in by_input.items()},
    )
