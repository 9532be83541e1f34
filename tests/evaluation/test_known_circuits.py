"""Circuits that are known: in sparsely-connected mode a CLT's connections are their edges."""

from itertools import combinations

import torch
from planted import TwoHops, compiled, precision_and_recall, trained

from sparseclt.connections.selection import random_connections
from sparseclt.evaluation.metrics import evaluate


def by_chance(clt, circuit) -> float:
    """Mean precision with upstream latents in other places."""
    return sum(precision_and_recall(clt, circuit, shuffle=seed)[0] for seed in range(20)) / 20


def test_both_hops_of_a_planted_circuit_are_found(tmp_path):
    model = TwoHops()
    clt = trained(model, torch.randint(256, (400, 16), generator=torch.Generator().manual_seed(0)), 12, 6, tmp_path)
    every_token = torch.arange(256).view(16, 16)
    second = evaluate(clt, model, every_token, cross_entropy=False).modules[1]
    assert second.fvu_sparse < 0.1 and second.fvu_disconnected > 0.5
    precision, recall = precision_and_recall(clt, model.circuit)
    assert precision > 0.8 and recall > 0.9
    assert by_chance(clt, model.circuit) < 0.6, "half of the first hops belong to each second one"
    clt.connect(random_connections(clt, 4, seed=0))
    assert evaluate(clt, model, every_token, cross_entropy=False).modules[1].fvu_sparse > 0.5


def test_the_connections_of_a_compiled_transformer_are_found(tmp_path):
    model, circuit = compiled()
    rows = torch.randint(16, (400, 16), generator=torch.Generator().manual_seed(0))
    clt = trained(model, rows, 16, 6, tmp_path)
    assert evaluate(clt, model, rows[:20], cross_entropy=False).modules[1].fvu_sparse < 0.1
    precision, recall = precision_and_recall(clt, circuit)
    assert precision > 0.7 and recall > 0.9
    assert by_chance(clt, circuit) < 0.6


def test_the_compiled_transformer_computes_what_it_should():
    model, circuit = compiled()
    tokens = torch.arange(16).view(4, 4)[:, [3, 0, 2, 1]]
    activations = model.capture(tokens)
    bits = (tokens[..., None] >> torch.arange(4) & 1).bool()
    xor = bits[:, 1:] ^ bits[:, :-1]
    both = torch.stack([xor[..., i] & xor[..., j] for i, j in combinations(range(4), 2)], -1)
    for layer, truth in enumerate((xor, both)):
        own = torch.tensor([place == layer for place in circuit.layers])
        written = activations.mlp_out[layer][:, 1:] @ circuit.directions[own].T
        assert torch.equal(written > 0.7, truth)
