import pytest
import torch
from harness import DTYPES, Guarded, assert_accurate, assert_same_bits, distinct_ids, rows, transposed, truth_and_peer

from csrc_triton import virtual_weights as kernels
from csrc_triton.transpose import transpose
from sparseclt.ops import virtual_weights


def case(F=20, D=40, U=25, C=6, dtype=torch.float32):
    return {
        "W_enc": rows(F, D, dtype=dtype, seed=1),
        "E": rows(U, D, dtype=dtype, seed=2),
        "connections": distinct_ids(F, C, count=U, seed=3),
    }


def ours(inputs, cotangent):
    with Guarded():
        csc = transpose(inputs["connections"], len(inputs["E"]))
        V = kernels.forward(*inputs.values())
        dW, dE = kernels.backward(cotangent, *inputs.values(), *csc, (True, True))
    return {"out0": V, "W_enc": dW, "E": dE}


def assert_right(inputs):
    truth, peer = truth_and_peer(virtual_weights, inputs)
    got = ours(inputs, truth["cotangent"])
    for name, value in got.items():
        assert_accurate(value, peer[name], truth[name], name)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype):
    assert_right(case(dtype=dtype))


@pytest.mark.parametrize("sizes", [dict(F=0), dict(C=0), dict(U=1, C=1), dict(C=25), dict(F=1, D=1)], ids=str)
def test_edge_sizes(sizes):
    assert_right(case(**sizes))


def test_empty_slots_are_zero_and_without_gradient():
    inputs = case()
    inputs["connections"][3], inputs["connections"][inputs["connections"] == 7] = -1, -1
    got = assert_right(inputs)
    assert not got["out0"][inputs["connections"] < 0].any() and not got["W_enc"][3].any() and not got["E"][7].any()


def test_any_strides():
    inputs, grad = case(), rows(20, 6, seed=9)
    moved = {name: transposed(value) for name, value in inputs.items()}
    assert_same_bits(*(tuple(ours(x, grad).values()) for x in (inputs, moved, inputs)))
