import pytest
import torch
from op_helpers import (
    WIDE,
    assert_matches_reference,
    assert_repeatable,
    largest_allocation,
    outputs_and_gradients,
    rows,
)

from sparseclt.ops import topk_encode

SHAPES = {  # N, D, F, K
    "odd": (37, 123, 300, 8),
    "no tokens": (0, 16, 32, 4),
    "one token": (1, 123, 77, 5),
    "k=1": (37, 16, 33, 1),
    "k=F": (5, 8, 41, 41),
}


def inputs(N, D, F, K, bias=True):
    return {"x": rows(N, D, seed=1), "W_enc": rows(F, D, seed=2), "b_enc": rows(F, seed=3) if bias else None, "k": K}


@pytest.mark.parametrize("scratch_bytes", [1, 3000, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_equals_reference_whatever_the_chunk(shape, scratch_bytes):
    assert_matches_reference(topk_encode, inputs(*shape), scratch_bytes=scratch_bytes)


def test_torch_equals_reference_without_bias():
    assert_matches_reference(topk_encode, inputs(*SHAPES["odd"], bias=False))


def test_torch_equals_reference_on_non_contiguous_inputs():
    case = inputs(*SHAPES["odd"])
    case["x"], case["W_enc"] = case["x"].T.contiguous().T, case["W_enc"].T.contiguous().T
    assert_matches_reference(topk_encode, case, scratch_bytes=3000)


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_equals_the_formula(backend):
    case = inputs(*SHAPES["odd"])
    values, indices = topk_encode(**case, backend=backend)
    expected = torch.relu(case["x"] @ case["W_enc"].T + case["b_enc"]).topk(case["k"])
    assert indices.dtype == torch.int64 and torch.equal(indices, expected.indices)
    torch.testing.assert_close(values, expected.values)


@pytest.mark.parametrize("shift", [-25.0, -1000.0], ids=["few positive", "all negative"])
def test_rows_with_fewer_than_k_positive_pre_activations_have_no_negative_value_and_a_masked_gradient(shift):
    """A fused encoder without the ReLU mask, or a top-k without the ReLU, gets this wrong."""
    case = inputs(*SHAPES["odd"])
    case["b_enc"] = case["b_enc"] + shift
    result = outputs_and_gradients(topk_encode, case, torch.float64, backend="torch")
    positive = result["out0"] > 0
    assert (positive.sum(1) < case["k"]).any() and (result["out0"] >= 0).all()
    assert_matches_reference(topk_encode, case)
    active = torch.zeros(300, dtype=torch.bool)
    active[result["out1"][positive]] = True
    assert not active.all()
    for name in ("W_enc", "b_enc"):
        assert (result[name][~active] == 0).all() and (shift < -100 or (result[name][active] != 0).any())


def test_every_entry_of_the_gradient_is_written_to_the_last_one():
    """A launch grid rounded down leaves the last entries zero in silence."""
    case = {
        "x": rows(37, 123, seed=1),
        "W_enc": rows(67, 123, seed=2),
        "b_enc": torch.full((67,), 200.0).double(),
        "k": 67,
    }
    result = outputs_and_gradients(topk_encode, case, torch.float64, backend="torch")
    assert all((result[name] != 0).all() for name in ("x", "W_enc", "b_enc"))
    assert_matches_reference(topk_encode, case)


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_gradcheck(backend):
    case = inputs(3, 4, 7, 3)
    leaves = [case[name].requires_grad_() for name in ("x", "W_enc", "b_enc")]
    assert torch.autograd.gradcheck(lambda *t: topk_encode(*t, 3, backend=backend)[0], leaves)


def test_only_the_wanted_gradients_are_computed():
    case = inputs(5, 4, 7, 3)
    case["b_enc"].requires_grad_()
    values, _ = topk_encode(**case)
    (grad,) = torch.autograd.grad(values.sum(), case["b_enc"])
    expected = topk_encode(**case, backend="reference")[0]
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), case["b_enc"])[0])


def test_the_pre_activations_of_all_tokens_never_exist():
    N, D, F = 64, 8, 5000
    assert largest_allocation(topk_encode, inputs(N, D, F, 2), scratch_bytes=60_000) <= F * D + F < N * F / 4


def test_repeatable():
    assert_repeatable(topk_encode, inputs(64, 32, 500, 16), scratch_bytes=20_000)


BAD = {
    "k too large": ({"k": 8}, ValueError, r"k: expected from 1 to F=7 .*got 8"),
    "k too small": ({"k": 0}, ValueError, r"k: expected from 1 to F=7 .*got 0"),
    "k a float": ({"k": 2.0}, TypeError, r"k: expected an int, got float"),
    "another D": ({"W_enc": rows(7, 5)}, ValueError, r"W_enc: expected shape \[F, D\] \(D=4 as in x\), got \(7, 5\)"),
    "another F": ({"b_enc": rows(6)}, ValueError, r"b_enc: expected shape \[F\] \(F=7 as in W_enc\), got \(6,\)"),
    "three axes": ({"x": rows(2, 3, 4)}, ValueError, r"x: expected shape \[N, D\], got \(2, 3, 4\)"),
    "another dtype": ({"W_enc": rows(7, 4).float()}, TypeError, r"W_enc: expected torch.float64, .* got torch.float32"),
    "integers": ({"x": torch.ones(3, 4).int()}, TypeError, r"x: expected a floating-point dtype, got torch.int32"),
    "no tensor": ({"x": [1.0]}, TypeError, r"x: expected a torch.Tensor, got list"),
    "another device": ({"W_enc": rows(7, 4).to("meta")}, ValueError, r"W_enc: expected on cpu, .*got meta"),
    "unknown backend": ({"backend": "cuda"}, ValueError, r"expected one of 'reference', 'torch'.* got 'cuda'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        topk_encode(**inputs(3, 4, 7, 3) | change)
