import pytest
import torch
from op_helpers import WIDE, assert_matches_reference, assert_repeatable, distinct_ids, largest_allocation, rows

from sparseclt.ops import Connections, virtual_weights

SHAPES = {  # F, D, U, C
    "odd": (77, 123, 300, 9),
    "C=1": (33, 16, 5, 1),
    "C=U": (10, 16, 7, 7),
    "no slots": (10, 16, 7, 0),
    "no upstream": (10, 16, 0, 3),
    "one latent": (1, 123, 40, 4),
}


def inputs(F, D, U, C):
    return {"W_enc": rows(F, D, seed=1), "E": rows(U, D, seed=2), "connections": distinct_ids(F, C, count=U, seed=3)}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_equals_reference(shape, dtype):
    case = inputs(*shape)
    case["connections"] = case["connections"].to(dtype)
    assert_matches_reference(virtual_weights, case)


def test_torch_equals_reference_on_non_contiguous_inputs():
    assert_matches_reference(virtual_weights, {n: t.T.contiguous().T for n, t in inputs(*SHAPES["odd"]).items()})


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_equals_the_formula_and_an_object_does_as_well(backend):
    case = inputs(*SHAPES["odd"])
    dense = case["W_enc"] @ case["E"].T
    expected = dense.gather(1, case["connections"].clamp_min(0)).masked_fill(case["connections"] < 0, 0)
    V = virtual_weights(**case, backend=backend)
    torch.testing.assert_close(V, expected)
    case["connections"] = Connections(case["connections"], 300)
    assert torch.equal(V, virtual_weights(**case, backend=backend))


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_gradcheck(backend):
    case = inputs(4, 3, 5, 3)
    leaves = [case["W_enc"].requires_grad_(), case["E"].requires_grad_()]
    assert torch.autograd.gradcheck(lambda W, E: virtual_weights(W, E, case["connections"], backend=backend), leaves)


def test_the_dense_virtual_weights_never_exist():
    F, D, U, C = 3000, 4, 5000, 2
    assert largest_allocation(virtual_weights, inputs(F, D, U, C)) <= (U + 1) * D < F * U / 100


def test_repeatable():
    assert_repeatable(virtual_weights, inputs(200, 32, 50, 16))


BAD = {
    "id too large": (
        {"connections": torch.full((4, 3), 5)},
        ValueError,
        r"connections: .*5 upstream latents.* got 5..5",
    ),
    "other rows": (
        {"connections": distinct_ids(5, 3, count=5)},
        ValueError,
        r"connections: expected shape \[F, C\] \(F=4 as in",
    ),
    "float ids": ({"connections": rows(4, 3)}, TypeError, r"connections: expected int32 or int64"),
    "another U": (
        {"connections": Connections(distinct_ids(4, 3, count=5), 9)},
        ValueError,
        r"E: expected 9 rows.* got 5",
    ),
    "another D": ({"E": rows(5, 2)}, ValueError, r"E: expected shape \[U, D\] \(D=3 as in W_enc\), got \(5, 2\)"),
    "another dtype": ({"E": rows(5, 3).float()}, TypeError, r"E: expected torch.float64"),
    "another device": ({"E": rows(5, 3).to("meta")}, ValueError, r"E: expected on cpu"),
    "unknown backend": ({"backend": ""}, ValueError, r"backend of virtual_weights: .*'torch'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        virtual_weights(**inputs(4, 3, 5, 3) | change)
