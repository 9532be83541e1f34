import pytest
import torch
from harness import DTYPES, Guarded, assert_accurate, assert_same_bits, ids, rows, strided, transposed

from csrc_triton import rows as kernels
from csrc_triton.transpose import transpose
from sparseclt.ops import _torch_rows

SHAPES = [(5, 8, 30, 40), (3, 11, 7, 70), (2, 1, 1, 1), (4, 3, 9, 300), (1, 17, 5, 513)]
names = [f"N{n}-K{k}-R{r}-D{d}" for n, k, r, d in SHAPES]
shapes = pytest.mark.parametrize(("N", "K", "R", "D"), SHAPES, ids=names)
EMPTY = [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 0, 4), (2, 3, 5, 0)]


def case(N, K, R, D, dtype=torch.float32, index_dtype=torch.int64):
    return (
        rows(N, K, dtype=dtype, seed=1),
        ids(N, K, count=R, dtype=index_dtype, seed=2),
        rows(R, D, dtype=dtype, seed=3),
        rows(N, D, dtype=dtype, seed=4),
    )


def three(weights, indices, table, bags):
    """The three products of the kernels, guarded."""
    with Guarded():
        order = transpose(indices, len(table))
        return (
            kernels.gather_sum(weights, indices, table),
            kernels.row_dots(bags, indices, table),
            kernels.transposed_gather_sum(weights, *order, bags),
        )


def dense_three(weights, indices, table, bags):
    """The same by dense products, in the dtype of the inputs."""
    used = (indices >= 0).to(weights.dtype)
    one = _torch_rows.dense(weights, indices, len(table))
    dots = (bags @ table.T).gather(1, indices.clamp_min(0).long()) * used if len(table) else weights * 0
    return one @ table, dots, one.T @ bags


def assert_right(ours, weights, indices, table, bags):
    truth = dense_three(weights.double(), indices, table.double(), bags.double())
    peer = dense_three(weights, indices, table, bags)
    for name, *three in zip(["gather_sum", "row_dots", "transposed_gather_sum"], ours, peer, truth, strict=True):
        assert_accurate(*three, name)


@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_match_float64(N, K, R, D, dtype):
    inputs = case(N, K, R, D, dtype, torch.int32 if K % 2 else torch.int64)
    assert_right(three(*inputs), *inputs)


@pytest.mark.parametrize("layout", [strided, transposed])
def test_any_strides(layout):
    inputs = case(5, 8, 30, 40)
    assert_same_bits(three(*map(layout, inputs)), three(*inputs))


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty_sizes(shape):
    inputs = case(*shape)
    for ours, dense in zip(three(*inputs), dense_three(*inputs), strict=True):
        assert ours.shape == dense.shape and not ours.any()


@pytest.mark.parametrize("part", [1, 2, 3, 8])
def test_long_lists_in_parts(part, monkeypatch):
    monkeypatch.setattr(kernels, "PART", part)
    weights, indices, table, bags = case(19, 4, 9, 40)
    indices[:, 0] = 5  # a hot row
    inputs = weights, indices, table, bags
    assert_right(three(*inputs), *inputs)


def test_all_slots_name_one_row(monkeypatch):
    monkeypatch.setattr(kernels, "PART", 7)
    weights, indices, table, bags = case(19, 4, 1, 40)
    inputs = weights, torch.zeros_like(indices), table, bags
    assert_right(three(*inputs), *inputs)


def test_parts_of_few_columns(monkeypatch):
    inputs = case(9, 4, 3, 150)
    monkeypatch.setattr(kernels, "PARTS_BYTES", 0)
    monkeypatch.setattr(kernels, "PART", 5)
    assert_right(three(*inputs), *inputs)


def test_runs_are_bitwise_equal_whatever_the_order_of_tokens():
    inputs = case(7, 8, 30, 40)
    shuffle = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    weights, indices, table, bags = inputs
    first = three(*inputs)
    assert_same_bits(first, three(*inputs), three(*inputs))
    for ours, moved in zip(first[:2], three(weights[shuffle], indices[shuffle], table, bags[shuffle]), strict=False):
        assert_same_bits(ours[shuffle], moved)


def test_nan_stays_and_empty_slots_hide_it():
    weights, indices, table, bags = case(4, 3, 5, 40)
    indices[0], indices[1], weights[0], bags[0] = -1, 2, torch.nan, torch.nan
    table[2, 7] = torch.nan
    sums, dots, transposed_sums = three(weights, indices, table, bags)
    assert not sums[0].any() and sums[1, 7].isnan() and not sums[1, :7].isnan().any()
    assert not dots[0].any() and dots[1].isnan().all()
    assert not transposed_sums.isnan().any()


@pytest.mark.parametrize("rows_of", [0, 1, 9])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_transpose_has_the_contract_of_the_torch_backend(rows_of, dtype):
    indices = ids(7, 4, count=rows_of, dtype=dtype)
    ours, theirs = transpose(indices, rows_of), _torch_rows.transpose(indices, rows_of)
    assert_same_bits(tuple(ours), tuple(theirs))


def test_an_id_out_of_range_is_an_error_on_the_cpu():
    weights, indices, table, bags = (t.cpu() for t in case(4, 3, 5, 40))
    indices[1, 1] = 5
    for run in (
        lambda: kernels.gather_sum(weights, indices, table),
        lambda: kernels.row_dots(bags, indices, table),
        lambda: transpose(indices, 5),
    ):
        with pytest.raises((ValueError, RuntimeError), match="indices|weights|bags"):
            run()


def test_float64_is_refused():
    weights, indices, table, _ = case(4, 3, 5, 40)
    with pytest.raises(TypeError, match="weights: expected float32, float16 or bfloat16.*float64"):
        kernels.gather_sum(weights.double(), indices, table.double())
