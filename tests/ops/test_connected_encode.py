import pytest
import torch
from op_helpers import (
    WIDE,
    assert_matches_reference,
    assert_repeatable,
    distinct_ids,
    ids,
    largest_allocation,
    outputs_and_gradients,
    rows,
)

from sparseclt.ops import Connections, connected_encode, topk_encode, virtual_matmul

SHAPES = {  # N, D, F, K, S, U, C
    "odd": (37, 123, 77, 8, 12, 300, 9),
    "duplicates": (37, 16, 33, 5, 12, 5, 4),
    "k=1, C=1": (5, 16, 33, 1, 3, 50, 1),
    "k=F": (5, 16, 21, 21, 3, 50, 4),
    "no tokens": (0, 16, 10, 3, 3, 7, 2),
    "one token": (1, 123, 10, 3, 3, 7, 2),
    "no active slots": (5, 16, 10, 3, 0, 7, 2),
    "no connections": (5, 16, 10, 3, 3, 7, 0),
    "no upstream": (5, 16, 10, 3, 0, 0, 0),
    "no upstream but slots": (5, 16, 10, 3, 2, 0, 3),
}


def inputs(N, D, F, K, S, U, C, bias=True):
    return {
        "r0": rows(N, D, seed=1),
        "W_enc": rows(F, D, seed=2) / D**0.5,
        "b_enc": rows(F, seed=3) if bias else None,
        "z_values": rows(N, S, seed=4).abs(),
        "z_indices": ids(N, S, count=U, seed=5),
        "V": rows(F, C, seed=6),
        "connections": distinct_ids(F, C, count=U, seed=7),
        "scale": rows(N, seed=8).abs() + 0.5,
        "k": K,
        "upstream": U,
    }


@pytest.mark.parametrize("scratch_bytes", [1, 7000, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_equals_reference_whatever_the_chunk(shape, scratch_bytes):
    assert_matches_reference(connected_encode, inputs(*shape), scratch_bytes=scratch_bytes)


def test_torch_equals_reference_without_bias():
    assert_matches_reference(connected_encode, inputs(*SHAPES["odd"], bias=False))


def test_torch_equals_reference_on_int32_indices():
    case = inputs(*SHAPES["odd"])
    case["z_indices"], case["connections"] = case["z_indices"].int(), case["connections"].int()
    assert_matches_reference(connected_encode, case)


def test_torch_equals_reference_on_non_contiguous_inputs():
    case = inputs(*SHAPES["odd"])
    for name, tensor in case.items():
        if isinstance(tensor, torch.Tensor) and tensor.ndim == 2:
            case[name] = tensor.T.contiguous().T
    assert_matches_reference(connected_encode, case, scratch_bytes=7000)


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_equals_the_formula(backend):
    case = inputs(*SHAPES["odd"])
    upstream = virtual_matmul(*(case[n] for n in ("z_values", "z_indices", "V", "connections")), upstream=300)
    pre = (case["r0"] @ case["W_enc"].T + upstream) / case["scale"][:, None] + case["b_enc"]
    expected = pre.relu().topk(case["k"])
    values, indices = connected_encode(**case, backend=backend)
    torch.testing.assert_close(values, expected.values)
    assert indices.dtype == torch.int64 and torch.equal(indices, expected.indices)


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_without_upstream_equals_topk_encode_of_the_normalised_input(backend):
    case = inputs(*SHAPES["no upstream"])
    x = case["r0"] / case["scale"][:, None]
    values, indices = connected_encode(**case, backend=backend)
    expected = topk_encode(x, case["W_enc"], case["b_enc"], case["k"], backend=backend)
    torch.testing.assert_close(values, expected[0])
    assert torch.equal(indices[values > 0], expected[1][values > 0])


@pytest.mark.parametrize("shift", [-3.0, -1000.0], ids=["few positive", "all negative"])
def test_rows_with_fewer_than_k_positive_pre_activations_have_a_masked_gradient(shift):
    case = inputs(*SHAPES["odd"])
    case["b_enc"] = case["b_enc"] + shift
    result = outputs_and_gradients(connected_encode, case, torch.float64, backend="torch")
    positive = result["out0"] > 0
    assert (positive.sum(1) < case["k"]).any() and (result["out0"] >= 0).all()
    assert_matches_reference(connected_encode, case)
    active = torch.zeros(77, dtype=torch.bool)
    active[result["out1"][positive]] = True
    assert not active.all()
    assert all((result[name][~active] == 0).all() for name in ("W_enc", "b_enc", "V"))


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_gradcheck(backend):
    case = inputs(3, 4, 7, 3, 4, 6, 3)
    names = ("r0", "W_enc", "b_enc", "z_values", "V")
    rest = {name: value for name, value in case.items() if name not in names}
    leaves = [case[name].requires_grad_() for name in names]
    call = lambda *t: connected_encode(**dict(zip(names, t, strict=True)), **rest, backend=backend)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("wanted", ["r0", "W_enc", "b_enc", "z_values", "V"])
def test_a_gradient_asked_for_alone_is_the_same(wanted, backend):
    case = inputs(*SHAPES["odd"])
    full = outputs_and_gradients(connected_encode, case, torch.float64, backend=backend)
    case[wanted].requires_grad_()
    values, _ = connected_encode(**case, backend=backend)
    (grad,) = torch.autograd.grad(values, case[wanted], rows(*values.shape, seed=99))
    assert torch.equal(grad, full[wanted])


def test_the_scale_has_no_gradient():
    case = inputs(*SHAPES["odd"])
    assert outputs_and_gradients(connected_encode, case, torch.float64, backend="torch")["scale"] is None


def test_nothing_of_tokens_by_latents_or_latents_by_upstream_exists():
    N, D, F, U = 64, 8, 5000, 4000
    case = inputs(N, D, F, 2, 3, U, 2)
    assert largest_allocation(connected_encode, case, scratch_bytes=60_000) <= (F + 1) * D < N * U / 4


def test_repeatable():
    assert_repeatable(connected_encode, inputs(64, 32, 50, 16, 20, 30, 16), scratch_bytes=5000)


BAD = {
    "k too large": ({"k": 8}, ValueError, r"k: expected from 1 to F=7"),
    "k too small": ({"k": 0}, ValueError, r"k: expected from 1 to F=7"),
    "U missing": ({"upstream": None}, ValueError, r"upstream: expected .*got None"),
    "other tokens": (
        {"r0": rows(2, 4)},
        ValueError,
        r"z_values: expected shape \[N, S\] \(N=2 as in r0\), got \(3, 4\)",
    ),
    "other latents": (
        {"W_enc": rows(9, 4), "b_enc": None},
        ValueError,
        r"V: expected shape \[F, C\] \(F=9 as in W_enc",
    ),
    "another scale": ({"scale": rows(3, 1)}, ValueError, r"scale: expected shape \[N\] \(N=3 as in r0\), got \(3, 1\)"),
    "scale's dtype": ({"scale": rows(3).float()}, TypeError, r"scale: expected torch.float64"),
    "scale's device": ({"scale": rows(3).to("meta")}, ValueError, r"scale: expected on cpu"),
    "id too large": ({"z_indices": torch.full((3, 4), 6)}, ValueError, r"z_indices: .*6 upstream latents"),
    "other connections": (
        {"connections": Connections(distinct_ids(7, 2, count=6), 6)},
        ValueError,
        r"connections: .*C=3 as in V",
    ),
    "unknown backend": ({"backend": "x"}, ValueError, r"backend of connected_encode: .*'torch'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        connected_encode(**inputs(3, 4, 7, 3, 4, 6, 3) | change)
