import pytest
import torch
from harness import DTYPES, Guarded, assert_accurate, assert_same_bits, ids, rows, transposed, truth_and_peer

from csrc_triton import sparse_decode as kernels
from sparseclt.ops import sparse_decode


def case(N=7, K=8, F=30, D=40, dtype=torch.float32):
    return {
        "values": rows(N, K, dtype=dtype, seed=1),
        "indices": ids(N, K, count=F, seed=2),
        "W_dec": rows(F, D, dtype=dtype, seed=3),
    }


def ours(inputs, cotangent):
    with Guarded():
        out = kernels.forward(*inputs.values())
        d_values, dW = kernels.backward(cotangent, *inputs.values(), (True, True))
    return {"out0": out, "values": d_values, "W_dec": dW}


def assert_right(inputs):
    truth, peer = truth_and_peer(sparse_decode, inputs)
    for name, value in ours(inputs, truth["cotangent"]).items():
        assert_accurate(value, peer[name], truth[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype):
    assert_right(case(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_transpose_view_as_decoder(dtype):
    inputs = case(dtype=dtype)
    assert_right(inputs | {"W_dec": transposed(inputs["W_dec"])})


def test_all_targets_in_one_gather():
    inputs = case()
    W = rows(30, 3, 40, seed=5)
    both = ours(inputs | {"W_dec": W[:, 1:].flatten(1)}, rows(7, 80, seed=9))
    each = [ours(inputs | {"W_dec": W[:, t]}, rows(7, 80, seed=9)[:, 40 * (t - 1) : 40 * t]) for t in (1, 2)]
    torch.testing.assert_close(both["out0"], torch.cat([e["out0"] for e in each], 1))
    torch.testing.assert_close(both["W_dec"], torch.cat([e["W_dec"] for e in each], 1))


@pytest.mark.parametrize("sizes", [dict(K=1), dict(N=0), dict(K=0), dict(F=1, K=3), dict(K=30)], ids=str)
def test_edge_sizes(sizes):
    assert_right(case(**sizes))


def test_only_the_gradients_asked_for():
    inputs, grad = case(), rows(7, 40, seed=9)
    d_values, dW = kernels.backward(grad, *inputs.values(), (True, False))
    assert d_values is not None and dW is None
    d_values, dW = kernels.backward(grad, *inputs.values(), (False, True))
    assert d_values is None and dW is not None


def test_gradients_are_exactly_zero_where_nothing_was_used():
    inputs = case()
    inputs["indices"][:, 3] = -1
    got = ours(inputs, rows(7, 40, seed=9))
    unused = torch.ones(30, dtype=torch.bool).index_fill(0, inputs["indices"].clamp_min(0).flatten().cpu(), False)
    unused[0] = not (inputs["indices"] == 0).any()
    assert unused.any() and not got["W_dec"][unused].any() and not got["values"][:, 3].any()


def test_three_runs_are_bitwise_equal():
    inputs, grad = case(), rows(7, 40, seed=9)
    assert_same_bits(*(tuple(ours(inputs, grad).values()) for _ in range(3)))


def test_rows_past_two_to_the_31():
    """A decoder whose rows lie 2^31 numbers apart, in an address space that nothing fills."""
    stride = 2**31 + 7
    try:
        storage = torch.empty(3 * stride, dtype=torch.float16)  # 13 GB, never touched but for three rows
    except RuntimeError:
        pytest.skip("no address space of 13 GB")
    W = storage.as_strided((3, 8), (stride, 1))
    W.copy_(rows(3, 8, dtype=torch.float16).cpu())
    inputs = case(N=2, K=3, F=3, D=8, dtype=torch.float16)
    if W.device != inputs["values"].device:
        pytest.skip("in the interpreter only")
    wide = kernels.forward(inputs["values"], inputs["indices"], W)
    assert_same_bits(wide, kernels.forward(inputs["values"], inputs["indices"], W.contiguous()))
