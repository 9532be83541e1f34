"""Influence, pruning and scores against circuit-tracer's definitions, written with dense matrices."""

import pytest
import torch
from graphs import graph_of

from sparseclt.graph.influence import influence, logit_weights, normalised_edges, prune, scores


def dense(graph, edges=None):
    """Adjacency [target, source] without the bias, in absolute values."""
    weight = graph.weight.abs() * ~graph.by_kind["bias"][graph.source]
    if edges is not None:
        weight = weight * edges
    A = torch.zeros(len(graph.nodes), len(graph.nodes), dtype=torch.float64)
    return A.index_put_((graph.target, graph.source), weight, accumulate=True)


def normalised(A):
    return A / A.sum(1, keepdim=True).clamp_min(1e-10)


def power_series(A, weights):
    total, term = torch.zeros_like(weights), weights
    while term.any():
        term = term @ A
        total += term
    return total


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_influence_is_the_power_series_of_the_normalised_adjacency(attention):
    graph = graph_of("gpt2", attention, True)
    ours = influence(graph, normalised_edges(graph))
    torch.testing.assert_close(
        ours, power_series(normalised(dense(graph)), logit_weights(graph)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("node_share", "edge_share"), [(0.8, 0.98), (0.5, 0.7), (1, 1), (0.3, 1)])
def test_pruning_keeps_the_fewest_nodes_and_edges_with_their_shares(node_share, edge_share):
    graph = graph_of("llama", "latents", True)
    pruned, weights = prune(graph, node_share, edge_share), logit_weights(graph)
    score = power_series(normalised(dense(graph)), weights)
    ranked = score.sort(descending=True).values
    enough = ranked[int((ranked.cumsum(0) / ranked.sum() < node_share - 1e-12).sum())]
    kinds, bias = graph.by_kind, graph.by_kind["bias"]
    nodes = (score >= enough - 1e-12) | kinds["embedding"] | kinds["logit"] | bias
    A = normalised(dense(graph, nodes[graph.source] & nodes[graph.target]))
    strength = A * (power_series(A, weights) + weights)[:, None]
    ranked = strength.flatten().sort(descending=True).values
    enough = ranked[min(int((ranked.cumsum(0) / ranked.sum() < edge_share - 1e-12).sum()), int((ranked > 0).sum()) - 1)]
    kept = (strength[graph.target, graph.source] >= enough - 1e-15) & ~bias[graph.source]
    kept &= strength[graph.target, graph.source] > 0
    while True:  # latents need edges on both sides, errors and attention need one that leads on
        kept &= nodes[graph.source] & nodes[graph.target]
        out = torch.zeros_like(nodes).index_put_((graph.source[kept],), torch.tensor(True))
        into = torch.zeros_like(nodes).index_put_((graph.target[kept],), torch.tensor(True))
        fewer = nodes & (kinds["embedding"] | kinds["logit"] | bias | (out & (into | ~kinds["latent"])))
        if fewer.equal(nodes):
            break
        nodes = fewer
    assert pruned.nodes.equal(nodes)
    assert pruned.edges[~bias[graph.source]].equal(kept[~bias[graph.source]])
    assert pruned.edges[bias[graph.source]].equal(nodes[graph.target[bias[graph.source]]])


def test_the_cumulative_share_ranks_nodes_by_influence():
    graph = graph_of("gpt2", "frozen", True)
    score, cumulative = influence(graph, normalised_edges(graph)), prune(graph).cumulative
    order = score.argsort(descending=True)
    torch.testing.assert_close(cumulative[order], score[order].cumsum(0) / score.sum())


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_scores_are_those_of_circuit_tracer(attention):
    graph = graph_of("pythia", attention, True)
    A, weights = normalised(dense(graph)), logit_weights(graph)
    reached, errors = power_series(A, weights), graph.by_kind["error"]
    tokens = reached[graph.by_kind["embedding"]].sum()
    output = reached + weights
    ours = scores(graph)
    assert ours.replacement == pytest.approx((tokens / (tokens + reached[errors].sum())).item())
    explained = ((1 - A[:, errors].sum(1)) * output).sum() / output.sum()
    assert ours.completeness == pytest.approx(explained.item())
    assert 0 < ours.replacement < 1 and sum(ours.input_shares.values()) == pytest.approx(1)
    assert (ours.input_shares["attention"] > 0) == (attention == "frozen")


@pytest.mark.parametrize("name", ["node_share", "edge_share"])
def test_a_share_above_1_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: expected a share from 0 to 1, got 1.5"):
        prune(graph_of("gpt2", "frozen", True), **{name: 1.5})
