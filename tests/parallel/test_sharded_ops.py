"""Ops over ranks against the same ops on one: values, indices with their ties, and gradients."""

import pytest
import torch
import torch.distributed as dist

from sparseclt import ops
from sparseclt.parallel import ALONE, Group, gather_columns, sum_over, to_columns, to_rows, topk_encode, virtual_weights

N, D, F, U, C = 7, 8, 12, 20, 3


def world() -> Group:
    return Group.of(dist.group.WORLD)


def encoder(ties: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, dtype=torch.float64, generator=generator)
    W = torch.randn(F, D, dtype=torch.float64, generator=generator)
    b = torch.randn(F, dtype=torch.float64, generator=generator)
    if ties:  # every row is there three times, on different ranks, and in whole numbers, whose sums are exact
        x, W, b = (2 * x).round(), (2 * W[: F // 3]).round().repeat(3, 1), b[: F // 3].round().repeat(3)
    return x, W, b


def weights(k: int) -> torch.Tensor:
    return torch.linspace(-1, 2, N * k, dtype=torch.float64).view(N, k)


def encode_share(k: int, ties: bool):
    """What each rank finds, and the gradients of its share of a loss."""
    group = world()
    x, W, b = encoder(ties)
    own = group.part(F, "F")
    leaves = [x, W[own].clone(), b[own].clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    values, indices = topk_encode(*leaves, k, group=group)
    # Each rank differentiates a share of the loss that is not alike: that of some of the tokens.
    share = torch.arange(N) % group.size == group.rank
    total = sum_over(((values * weights(k))[share]).sum(), group)
    total.backward()
    return values.detach(), indices, total.detach(), [leaf.grad for leaf in leaves], group.sent


@pytest.mark.parametrize(("k", "ties"), [(3, False), (5, True), (F, False)], ids=["k 3", "ties", "k of all"])
@pytest.mark.parametrize("n", [2, 4])
def test_top_k_over_ranks_is_that_of_one(ranks, n, k, ties):
    x, W, b = (tensor.requires_grad_() for tensor in encoder(ties))
    values, indices = ops.topk_encode(x, W, b, k)
    (values * weights(k)).sum().backward()
    results = ranks.run(n, encode_share, k, ties)
    for own_values, own_indices, total, _, _ in results:
        torch.testing.assert_close(own_values, values.detach(), rtol=0, atol=1e-12)
        assert torch.equal(own_indices[values > 0], indices[values > 0])
        assert (own_indices.sort(1).values.diff(dim=1) > 0).all()  # distinct, zeros included
        torch.testing.assert_close(total, (values * weights(k)).sum().detach(), rtol=0, atol=1e-12)
    grads = [result[3] for result in results]
    torch.testing.assert_close(sum(grad[0] for grad in grads), x.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([grad[1] for grad in grads]), W.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat([grad[2] for grad in grads]), b.grad, rtol=0, atol=1e-12)


def test_it_sends_k_values_and_ids_for_each_token(ranks):
    sent = ranks.run(2, encode_share, 3, False)[0][4]
    assert sent["all_gather"] == N * 3 * (8 + 4)  # float64 values, int32 ids


def test_more_latents_than_all_ranks_have_are_refused():
    x, W, b = encoder(False)
    with pytest.raises(ValueError, match=f"k: expected from 1 to F={F} .*, got {F + 1}"):
        topk_encode(x, W, b, F + 1, group=None)


def connected() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(F, D, dtype=torch.float64, generator=generator)
    E = torch.randn(U, D, dtype=torch.float64, generator=generator)
    connections = torch.rand(F, U, generator=generator).argsort(1)[:, :C]
    connections[torch.rand(F, C, generator=generator) < 0.2] = -1
    return W, E, connections


def virtual_share():
    group = world()
    W, E, connections = connected()
    rows, columns = group.part(F, "F"), group.part(D, "D")
    W, E = W[rows].clone().requires_grad_(), E[:, columns].clone().requires_grad_()
    V = virtual_weights(W, E, connections[rows], group=dist.group.WORLD)
    (V * torch.linspace(-1, 2, F * C, dtype=torch.float64).view(F, C)[rows]).sum().backward()
    return V.detach(), W.grad, E.grad


@pytest.mark.parametrize("n", [2, 4])
def test_virtual_weights_over_ranks_are_those_of_one(ranks, n):
    W, E, connections = connected()
    V = ops.virtual_weights(W.requires_grad_(), E.requires_grad_(), connections)
    (V * torch.linspace(-1, 2, F * C, dtype=torch.float64).view(F, C)).sum().backward()
    shares = ranks.run(n, virtual_share)
    for expected, axis, parts in zip((V.detach(), W.grad, E.grad), (0, 0, 1), zip(*shares, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(parts, axis), expected, rtol=0, atol=1e-12)


def exchanges():
    group = world()
    table = torch.arange(F * D, dtype=torch.float64).view(F, D)
    rows, columns = table[group.part(F, "F")], table[:, group.part(D, "D")]
    assert torch.equal(to_columns(rows, group), columns) and torch.equal(to_rows(columns, group), rows)
    assert torch.equal(gather_columns(columns, group), table)
    checked = [
        torch.autograd.gradcheck(lambda t: to_rows(to_columns(t, group), group), rows.clone().requires_grad_()),
        # A rank's share of the loss: a part of the gathered columns, whose gradient reaches the rank that has them.
        gather_columns(columns.clone().requires_grad_(), group),
    ]
    checked[1][:, : group.rank + 1].sum().backward()
    return checked[0]


def gather_gradient():
    group = world()
    columns = torch.ones(F, D // group.size, dtype=torch.float64, requires_grad=True)
    gather_columns(columns, group)[group.rank].sum().backward()
    return columns.grad


def test_rows_become_columns_and_come_back(ranks):
    assert ranks.run(4, exchanges) == [True] * 4


def test_the_gradient_of_gathered_columns_is_the_sum_of_all_ranks_parts(ranks):
    for grad in ranks.run(2, gather_gradient):
        expected = torch.zeros(F, D // 2, dtype=torch.float64)
        expected[:2] = 1
        assert torch.equal(grad, expected)


def test_one_rank_sends_nothing_and_parts_must_be_alike():
    x = torch.randn(4, 4)
    assert to_columns(x, ALONE) is x and gather_columns(x, ALONE) is x and not ALONE.sent
    with pytest.raises(ValueError, match=r"clt.latents: expected a multiple of 3, .*got 10.*parallel.latents"):
        Group(0, 3).part(10, "clt.latents")
