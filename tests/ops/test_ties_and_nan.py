"""Ties go to the lowest index, NaN counts as the largest, on every backend and whatever the chunk."""

import pytest
import torch
from op_helpers import BACKENDS, DEVICE

from sparseclt.ops import batchtopk_encode, connected_encode, jumprelu_encode, select_connections, topk_encode

ALL = ["reference", *BACKENDS]
SCRATCH = {"scratch_bytes": 2000}


def whole_numbers(*shape, seed=0):
    """Products of such numbers are exact in any order, and tie often."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float().to(DEVICE)


def first(score, k):
    """The k largest, ties to the lowest index."""
    return score.sort(dim=1, descending=True, stable=True).indices[:, :k]


@pytest.mark.parametrize("k", [1, 7, 40])
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("activation", ["topk", "abstopk"])
def test_topk(activation, backend, k):
    x, W = whole_numbers(30, 6), whole_numbers(40, 6, seed=1)
    pre = x @ W.T
    values, indices = topk_encode(x, W, None, k, activation=activation, backend=backend, **SCRATCH)
    score = pre.relu() if activation == "topk" else pre.abs()
    expected = first(score, k)
    signed = score if activation == "topk" else pre
    assert torch.equal(values, signed.gather(1, expected))
    assert torch.equal(indices[values != 0], expected[values != 0])


@pytest.mark.parametrize("backend", ALL)
def test_groupmax(backend):
    x, W = whole_numbers(30, 6), whole_numbers(40, 6, seed=1)
    values, indices = topk_encode(x, W, None, 8, activation="groupmax", backend=backend, **SCRATCH)
    best = (x @ W.T).relu().view(30, 8, 5).max(2)
    expected, order = best.values.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected)
    latents = (best.indices + torch.arange(0, 40, 5, device=DEVICE)).gather(1, order)
    assert torch.equal(indices[values > 0], latents[values > 0])


@pytest.mark.parametrize("backend", ALL)
def test_batchtopk_takes_the_lowest_token_then_the_lowest_index(backend):
    x, W = whole_numbers(30, 6), whole_numbers(40, 6, seed=1)
    pre = (x @ W.T).relu()
    kept = torch.zeros(30 * 40, dtype=torch.bool, device=DEVICE)
    kept[pre.flatten().sort(descending=True, stable=True).indices[: 30 * 3]] = True
    last = pre[kept.view(30, 40)].min()
    assert (pre == last).sum() > (pre[kept.view(30, 40)] == last).sum() > 0, "the test must be able to tell"
    values, indices = batchtopk_encode(x, W, None, 3, backend=backend, **SCRATCH)
    dense = torch.zeros_like(pre).scatter_add(1, indices.clamp_min(0), values)
    assert torch.equal(dense, pre * kept.view(30, 40))
    assert torch.equal(values.sort(dim=1, descending=True, stable=True).values, values)


@pytest.mark.parametrize("backend", ALL)
def test_connected_encode(backend):
    x, W = whole_numbers(30, 6), whole_numbers(40, 6, seed=1)
    V = whole_numbers(40, 3, seed=2)
    connections = torch.arange(120, device=DEVICE).view(40, 3) % 7
    z, places = whole_numbers(30, 2, seed=3).abs(), torch.arange(60, device=DEVICE).view(30, 2) % 7
    inputs = (x, W, None, z, places, V, connections, torch.ones(30, device=DEVICE), 5)
    values, indices = connected_encode(*inputs, upstream=7, backend=backend, **SCRATCH)
    dense = torch.zeros(30, 7, device=DEVICE).scatter_add(1, places, z)
    weights = torch.zeros(40, 7, device=DEVICE).scatter_add(1, connections, V)
    pre = (x @ W.T + dense @ weights.T).relu()
    expected = first(pre, 5)
    assert torch.equal(values, pre.gather(1, expected))
    assert torch.equal(indices[values > 0], expected[values > 0])


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("backend", ALL)
def test_select_connections_even_among_zeros(backend, heads):
    W, E = whole_numbers(heads, 30, 6), whole_numbers(40, 6, seed=1)
    importance = whole_numbers(40, seed=2).abs()  # zeros as well
    expected = first(importance * (W @ E.T).norm(dim=0), 38)
    assert torch.equal(select_connections(W, E, importance, 38, backend=backend, **SCRATCH), expected)


@pytest.mark.parametrize("activation", ["topk", "abstopk", "groupmax"])
@pytest.mark.parametrize("backend", ALL)
def test_nan_and_infinity_are_the_largest_and_never_dropped(backend, activation):
    x, W = whole_numbers(3, 6) + 0.5, whole_numbers(40, 6, seed=1)
    b = torch.zeros(40, device=DEVICE)
    b[torch.tensor([7, 31])], b[20] = torch.nan, torch.inf
    values, indices = topk_encode(x, W, b, 4, activation=activation, backend=backend)
    assert values[:, :2].isnan().all() and not values[:, 2:].isnan().any() and (values[:, 2] == torch.inf).all()
    assert indices[:, :3].tolist() == [[7, 31, 20]] * 3  # in three of the four groups of ten


@pytest.mark.parametrize("backend", ALL)
def test_nan_reaches_the_ragged_rows(backend):
    x, W = whole_numbers(3, 6) + 0.5, whole_numbers(40, 6, seed=1)
    x[1, 2] = torch.nan
    values, indices = batchtopk_encode(x, W, None, 2, backend=backend)
    assert values[1].isnan().any() and not values[0].isnan().any() and (indices[1][values[1].isnan()] >= 0).all()
    threshold = torch.ones(40, device=DEVICE)
    values, indices, _ = jumprelu_encode(x, W, None, threshold, backend=backend)
    assert values.isnan().sum(1).tolist() == [0, 40, 0] and (indices[1] >= 0).all()
