import pytest
import torch
from op_helpers import BACKENDS, DEVICE, LargestAllocation, ids, rows

from sparseclt.ops import _torch_rows
from sparseclt.ops import rows as products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scratch_bytes", [1, 1 << 20])
def test_row_dots_without_the_private_op_are_the_same(monkeypatch, dtype, scratch_bytes):
    bags, indices, table = rows(7, 5).to(dtype), ids(7, 4, count=9), rows(9, 5, seed=1).to(dtype)
    expected = _torch_rows.row_dots(bags, indices, table)
    with monkeypatch.context() as without:
        without.setattr(_torch_rows.torch.ops, "aten", object())
        got = _torch_rows.row_dots(bags, indices, table, scratch_bytes)
    torch.testing.assert_close(got, expected)


def test_a_transpose_of_a_transpose_is_the_dense_product():
    weights, indices, bags = rows(7, 4), ids(7, 4, count=9), rows(7, 5, seed=1)
    sums = _torch_rows.transposed_gather_sum(weights, *_torch_rows.transpose(indices, 9), bags)
    torch.testing.assert_close(sums, _torch_rows.dense(weights, indices, 9).T @ bags)


def test_adding_at_places_is_scatter_add_and_always_the_same():
    places, values = torch.arange(50_000, device=DEVICE) % 7, rows(50_000, 1).flatten().float()
    once, again = (_torch_rows.add_at_(torch.zeros(9, device=DEVICE), places, values) for _ in range(2))
    expected = torch.zeros(9, dtype=torch.float64, device=DEVICE).scatter_add_(0, places, values.double())
    torch.testing.assert_close(once.double(), expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(once, again)


@pytest.mark.parametrize(("total", "scratch"), [(0, 10), (1, 0), (10, 25), (10, 1000)])
def test_chunks_cover_everything_once(total, scratch):
    parts = list(_torch_rows.chunks(total, 10, scratch))
    assert [i for part in parts for i in range(total)[part]] == list(range(total))
    assert all(part.stop - part.start <= max(1, scratch // 10) for part in parts)


@pytest.mark.parametrize("backend", [None, "reference", *BACKENDS])
def test_the_products_are_dense_ones_under_every_backend(backend):
    weights, indices = rows(7, 4).float(), ids(7, 4, count=9)
    table, bags = rows(9, 5, seed=1).float(), rows(7, 5, seed=2).float()
    scattered = _torch_rows.dense(weights, indices, 9)
    dots = (bags @ table.T).gather(1, indices.clamp_min(0)) * (indices >= 0)
    torch.testing.assert_close(products.gather_sum(weights, indices, table, backend=backend), scattered @ table)
    torch.testing.assert_close(products.row_dots(bags, indices, table, backend=backend), dots)
    summed = products.transposed_gather_sum(weights, products.transpose(indices, 9), bags, backend=backend)
    torch.testing.assert_close(summed, scattered.T @ bags)


@pytest.mark.parametrize("backend", [None, "reference", *BACKENDS])
def test_outer_products_of_sparse_vectors_are_added_as_dense_ones(backend):
    weights, indices, values, columns = rows(70, 4), ids(70, 4, count=9), rows(70, 6, seed=1), ids(70, 6, count=5)
    total = rows(9, 5, seed=2)
    expected = total + _torch_rows.dense(weights, indices, 9).T @ _torch_rows.dense(values, columns, 5)
    total, weights, values = total.float(), weights.float(), values.float()
    products.add_outer_products_(total, weights, indices.int(), values, columns.int(), backend=backend)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)


def test_outer_products_take_only_their_scratch_and_are_the_same_bits_whatever_it_is():
    weights, indices, values, columns = rows(100, 8), ids(100, 8, count=9), rows(100, 8, seed=1), ids(100, 8, count=9)
    totals, largest = [], []
    for scratch in (1, 10_000, 10_000_000):
        total = torch.zeros(9, 9, dtype=torch.float64, device=DEVICE)
        with LargestAllocation() as seen:
            _torch_rows.add_outer_products_(total, weights, indices, values, columns, scratch)
        totals.append(total)
        largest.append(seen.elements)
    assert all(torch.allclose(total, totals[0], rtol=1e-12) for total in totals)
    if DEVICE == "cpu":
        assert all(torch.equal(total, totals[0]) for total in totals)
    pairs = int((indices >= 0).sum()) * 8
    assert largest[1] < pairs <= largest[2]


def test_an_unknown_backend_is_refused_by_name():
    with pytest.raises(ValueError, match=r"backend of gather_sum: expected one of 'reference'.* got 'x'"):
        products.gather_sum(rows(7, 4), ids(7, 4, count=9), rows(9, 5), backend="x")
