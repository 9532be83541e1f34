import pytest
import torch
from op_helpers import (
    BACKENDS,
    WIDE,
    assert_matches_reference,
    assert_repeatable,
    distinct_ids,
    ids,
    largest_allocation,
    outputs_and_gradients,
    rows,
)

from sparseclt.ops import Connections, attention_encode, connected_encode, virtual_matmul

SHAPES = {  # B, S, D, F, K, H, A, U, C
    "odd": (3, 7, 23, 41, 6, 2, 5, 60, 4),
    "one head, k=1, C=1": (2, 5, 8, 20, 1, 1, 3, 50, 1),
    "k=F": (2, 3, 8, 11, 11, 2, 3, 20, 4),
    "one token": (1, 1, 8, 11, 3, 2, 3, 20, 4),
    "no sequences": (0, 4, 8, 11, 3, 2, 3, 20, 4),
    "no active slots": (2, 4, 8, 11, 3, 2, 0, 20, 4),
    "no upstream": (2, 4, 8, 11, 3, 2, 0, 0, 0),
}
DIFFERENTIABLE = ("x", "W_enc", "b_enc", "z_values", "V")


def inputs(B, S, D, F, K, H, A, U, C, bias=True):
    return {
        "x": rows(B, S, D, seed=1),
        "W_enc": rows(F, D, seed=2) / D**0.5,
        "b_enc": rows(F, seed=3) if bias else None,
        "z_values": rows(B, S, A, seed=4).abs(),
        "z_indices": ids(B, S, A, count=U, seed=5),
        "V": rows(H, F, C, seed=6),
        "connections": distinct_ids(F, C, count=U, seed=7),
        "mix": rows(B, H, S, S, seed=8).abs().tril(),
        "k": K,
        "upstream": U,
    }


@pytest.mark.parametrize("scratch_bytes", [1, 8000, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_backends_equal_reference_whatever_the_chunk(shape, scratch_bytes):
    assert_matches_reference(attention_encode, inputs(*shape), scratch_bytes=scratch_bytes)


def test_backends_equal_reference_without_bias():
    assert_matches_reference(attention_encode, inputs(*SHAPES["odd"], bias=False))


def test_backends_equal_reference_on_int32_ids():
    case = inputs(*SHAPES["odd"])
    case["z_indices"], case["connections"] = case["z_indices"].int(), case["connections"].int()
    assert_matches_reference(attention_encode, case)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_equals_the_formula(backend):
    case = inputs(*SHAPES["odd"])
    case = {n: t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in case.items()}
    pre = case["x"] @ case["W_enc"].T + case["b_enc"]
    z = case["z_values"].flatten(0, 1), case["z_indices"].flatten(0, 1)
    for head in range(2):
        written = virtual_matmul(*z, case["V"][head], case["connections"], upstream=60, backend="reference")
        pre = pre + case["mix"][:, head] @ written.view_as(pre)
    expected = pre.relu().topk(case["k"])
    values, indices = attention_encode(**case, backend=backend)
    torch.testing.assert_close(values, expected.values)
    assert indices.dtype == torch.int64 and torch.equal(indices[values > 0], expected.indices[values > 0])


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_a_pattern_that_attends_only_to_itself_equals_connected_encode(backend):
    case = inputs(*SHAPES["one head, k=1, C=1"])
    case["mix"] = torch.eye(5).expand(2, 1, 5, 5).to(case["x"])
    values, indices = attention_encode(**case, backend=backend)
    token = {name: case[name].flatten(0, 1) for name in ("z_values", "z_indices")} | {"V": case["V"][0]}
    rest = {name: case[name] for name in ("W_enc", "b_enc", "connections", "k", "upstream")}
    r0 = case["x"].flatten(0, 1)
    expected = connected_encode(r0, **rest, **token, scale=torch.ones_like(r0[:, 0]), backend=backend)
    torch.testing.assert_close(values.flatten(0, 1), expected[0])
    assert torch.equal(indices.flatten(0, 1)[expected[0] > 0], expected[1][expected[0] > 0])


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_gradcheck(backend):
    case = inputs(2, 3, 4, 7, 3, 2, 4, 6, 3)
    rest = {name: value for name, value in case.items() if name not in DIFFERENTIABLE}
    leaves = [case[name].requires_grad_() for name in DIFFERENTIABLE]

    def run(*tensors):
        return attention_encode(**dict(zip(DIFFERENTIABLE, tensors, strict=True)), **rest, backend=backend)[0]

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", WIDE)
@pytest.mark.parametrize("wanted", DIFFERENTIABLE)
def test_a_gradient_asked_for_alone_is_the_same(wanted, backend):
    case = inputs(*SHAPES["odd"])
    full = outputs_and_gradients(attention_encode, case, torch.float64, backend=backend)
    case[wanted].requires_grad_()
    values, _ = attention_encode(**case, backend=backend)
    (grad,) = torch.autograd.grad(values, case[wanted], rows(*values.shape, seed=99))
    assert torch.equal(grad, full[wanted])


def test_the_pattern_has_no_gradient():
    case = inputs(*SHAPES["odd"])
    for backend in ("reference", *WIDE):
        assert outputs_and_gradients(attention_encode, case, torch.float64, backend=backend)["mix"] is None


def test_slots_without_a_positive_value_have_no_gradient():
    case = inputs(*SHAPES["odd"])
    case["b_enc"] = case["b_enc"] - 4
    result = outputs_and_gradients(attention_encode, case, torch.float64, backend="torch")
    positive = result["out0"] > 0
    assert positive.any() and (positive.sum(-1) < case["k"]).any() and (result["out0"] >= 0).all()
    assert_matches_reference(attention_encode, case)


def test_nothing_of_heads_by_latents_exists():
    B, S, F, H = 8, 10, 3000, 4
    case = inputs(B, S, 8, F, 2, H, 3, 500, 2)
    assert largest_allocation(attention_encode, case, scratch_bytes=1) <= 2 * S * F < B * S * F / 2


def test_repeatable():
    assert_repeatable(attention_encode, inputs(*SHAPES["odd"]), scratch_bytes=8000)


BAD = {
    "k too large": ({"k": 8}, ValueError, r"k: expected from 1 to F=7"),
    "U missing": ({"upstream": None}, ValueError, r"upstream: expected .*got None"),
    "two axes": ({"x": rows(3, 4)}, ValueError, r"x: expected shape \[B, S, D\], got \(3, 4\)"),
    "other heads": ({"V": rows(3, 7, 3)}, ValueError, r"mix: expected shape \[B, H, S, S\] \(.*H=3 as in V"),
    "other keys": ({"mix": rows(2, 2, 3, 4)}, ValueError, r"mix: expected shape \[B, H, S, S\]"),
    "the pattern's dtype": ({"mix": rows(2, 2, 3, 3).float()}, TypeError, r"mix: expected torch.float64"),
    "id too large": ({"z_indices": torch.full((2, 3, 4), 6)}, ValueError, r"z_indices: .*6 upstream latents"),
    "other connections": (
        {"connections": Connections(distinct_ids(7, 2, count=6), 6)},
        ValueError,
        r"connections: .*C=3 as in V",
    ),
    "unknown backend": ({"backend": "x"}, ValueError, r"backend of attention_encode: .*'torch'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        attention_encode(**inputs(2, 3, 4, 7, 3, 2, 4, 6, 3) | change)
