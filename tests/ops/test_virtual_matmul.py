import pytest
import torch
from op_helpers import WIDE, assert_matches_reference, assert_repeatable, distinct_ids, ids, largest_allocation, rows

from sparseclt.ops import Connections, virtual_matmul

SHAPES = {  # N, S, F, U, C
    "odd": (37, 12, 77, 300, 9),
    "duplicates": (37, 12, 33, 5, 4),
    "C=1": (5, 3, 33, 50, 1),
    "no tokens": (0, 3, 10, 7, 2),
    "one token": (1, 3, 10, 7, 2),
    "no active slots": (5, 0, 10, 7, 2),
    "no connections": (5, 3, 10, 7, 0),
    "no upstream": (5, 0, 10, 0, 0),
    "no upstream but slots": (5, 2, 10, 0, 3),
}


def inputs(N, S, F, U, C):
    return {
        "z_values": rows(N, S, seed=1).abs(),
        "z_indices": ids(N, S, count=U, seed=2),
        "V": rows(F, C, seed=3),
        "connections": distinct_ids(F, C, count=U, seed=4),
        "upstream": U,
    }


@pytest.mark.parametrize("scratch_bytes", [1, 7000, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_equals_reference_whatever_the_chunk(shape, scratch_bytes):
    assert_matches_reference(virtual_matmul, inputs(*shape), scratch_bytes=scratch_bytes)


def test_torch_equals_reference_on_int32_indices():
    case = inputs(*SHAPES["odd"])
    case["z_indices"], case["connections"] = case["z_indices"].int(), case["connections"].int()
    assert_matches_reference(virtual_matmul, case)


def test_torch_equals_reference_on_non_contiguous_inputs():
    case = inputs(*SHAPES["odd"])
    assert_matches_reference(
        virtual_matmul, {n: t.T.contiguous().T if isinstance(t, torch.Tensor) else t for n, t in case.items()}
    )


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_equals_the_formula(backend):
    case = inputs(*SHAPES["duplicates"])
    z, V = torch.zeros(37, 5).double(), torch.zeros(33, 5).double()
    for n, slot in (case["z_indices"] >= 0).nonzero().tolist():
        z[n, case["z_indices"][n, slot]] += case["z_values"][n, slot]
    for i, slot in (case["connections"] >= 0).nonzero().tolist():
        V[i, case["connections"][i, slot]] += case["V"][i, slot]
    torch.testing.assert_close(virtual_matmul(**case, backend=backend), z @ V.T)


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_gradcheck(backend):
    case = inputs(3, 4, 5, 6, 3)
    leaves = [case["z_values"].requires_grad_(), case["V"].requires_grad_()]
    connections = Connections(case["connections"], 6)
    assert torch.autograd.gradcheck(
        lambda z, V: virtual_matmul(z, case["z_indices"], V, connections, backend=backend), leaves
    )


def test_dense_virtual_weights_and_dense_upstream_latents_never_exist():
    N, F, U = 64, 3000, 5000
    assert largest_allocation(virtual_matmul, inputs(N, 3, F, U, 2), scratch_bytes=60_000) <= N * F < N * U


def test_repeatable():
    assert_repeatable(virtual_matmul, inputs(64, 20, 50, 30, 16), scratch_bytes=5000)


BAD = {
    "U missing": ({"upstream": None}, ValueError, r"upstream: expected .*bare tensor, got None; pass upstream=U"),
    "U below 0": ({"upstream": -1}, ValueError, r"upstream: expected .*>= 0, got -1"),
    "another U": (
        {"connections": Connections(distinct_ids(5, 3, count=6), 9)},
        ValueError,
        r"upstream: expected 9.* got 6",
    ),
    "id too large": ({"z_indices": torch.full((3, 4), 6)}, ValueError, r"z_indices: .*6 upstream latents.* got 6..6"),
    "connection too large": ({"connections": torch.full((5, 3), 6)}, ValueError, r"connections: .* got 6..6"),
    "float ids": ({"z_indices": rows(3, 4)}, TypeError, r"z_indices: expected int32 or int64"),
    "another S": ({"z_indices": ids(3, 2, count=6)}, ValueError, r"z_indices: expected shape \[N, S\].*got \(3, 2\)"),
    "another C": ({"V": rows(5, 2)}, ValueError, r"connections: expected shape \[F, C\].*C=2 as in V.*got \(5, 3\)"),
    "another dtype": ({"V": rows(5, 3).float()}, TypeError, r"V: expected torch.float64"),
    "unknown backend": ({"backend": "x"}, ValueError, r"backend of virtual_matmul: .*'torch'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        virtual_matmul(**inputs(3, 4, 5, 6, 3) | change)
