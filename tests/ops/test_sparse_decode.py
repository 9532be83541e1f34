import pytest
import torch
from op_helpers import WIDE, assert_matches_reference, assert_repeatable, ids, largest_allocation, rows

from sparseclt.ops import sparse_decode

SHAPES = {  # N, K, F, decoder's other axes
    "odd": (37, 8, 300, (123,)),
    "three targets": (37, 5, 77, (3, 41)),
    "one target": (4, 5, 77, (1, 41)),
    "no tokens": (0, 4, 30, (16,)),
    "one token": (1, 1, 33, (123,)),
    "more slots than latents": (6, 9, 4, (2, 5)),
    "no latents": (3, 2, 0, (5,)),
}


def inputs(N, K, F, axes, bias=True):
    return {
        "values": rows(N, K, seed=1),
        "indices": ids(N, K, count=F, seed=2),
        "W_dec": rows(F, *axes, seed=3),
        "b_dec": rows(*axes, seed=4) if bias else None,
    }


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_torch_equals_reference(shape, dtype):
    case = inputs(*shape)
    case["indices"] = case["indices"].to(dtype)
    assert_matches_reference(sparse_decode, case)


def test_torch_equals_reference_without_bias():
    assert_matches_reference(sparse_decode, inputs(*SHAPES["three targets"], bias=False))


def test_torch_equals_reference_on_non_contiguous_inputs():
    case = inputs(*SHAPES["three targets"])
    case = {name: tensor.movedim(0, -1).contiguous().movedim(-1, 0) for name, tensor in case.items()}
    assert not case["W_dec"].is_contiguous()
    assert_matches_reference(sparse_decode, case)


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_equals_the_formula(backend):
    case = inputs(*SHAPES["three targets"])
    values = case["values"].masked_fill(case["indices"] < 0, 0)
    expected = torch.einsum("nk,nktd->ntd", values, case["W_dec"][case["indices"].clamp_min(0)]) + case["b_dec"]
    torch.testing.assert_close(sparse_decode(**case, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_an_empty_slot_is_worth_zero_without_gradient(backend):
    case = inputs(3, 2, 5, (4,), bias=False)
    case["indices"] = torch.full((3, 2), -1)
    case["values"].requires_grad_()
    case["W_dec"].requires_grad_()
    out = sparse_decode(**case, backend=backend)
    out.sum().backward()
    assert all((t == 0).all() for t in (out, case["values"].grad, case["W_dec"].grad))


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_gradcheck(backend):
    case = inputs(3, 4, 5, (2, 3))
    leaves = [case[name].requires_grad_() for name in ("values", "W_dec", "b_dec")]
    assert torch.autograd.gradcheck(lambda v, W, b: sparse_decode(v, case["indices"], W, b, backend=backend), leaves)


def test_every_entry_of_the_decoder_gradient_is_written_to_the_last_one():
    """A launch grid rounded down leaves the last entries zero in silence."""
    case = inputs(37, 67, 67, (123,))
    case["indices"] = torch.arange(67).expand(37, 67)
    case["W_dec"].requires_grad_()
    (grad,) = torch.autograd.grad(sparse_decode(**case).sum(), case["W_dec"])
    torch.testing.assert_close(grad, case["values"].sum(0)[:, None].expand_as(grad))


def test_latents_are_never_dense():
    N, K, F, D = 200, 2, 5000, 8
    assert largest_allocation(sparse_decode, inputs(N, K, F, (D,))) <= (F + 1) * D < N * F / 4


def test_repeatable():
    assert_repeatable(sparse_decode, inputs(300, 16, 50, (3, 40)))


BAD = {
    "id too large": (
        {"indices": torch.full((3, 2), 5)},
        ValueError,
        r"indices: expected ids from -1 .* to 4 .* got 5..5",
    ),
    "id below -1": ({"indices": torch.full((3, 2), -2)}, ValueError, r"indices: expected ids from -1 .* got -2..-2"),
    "float ids": ({"indices": rows(3, 2)}, TypeError, r"indices: expected int32 or int64, got torch.float64"),
    "ids a list": ({"indices": [1]}, TypeError, r"indices: expected a torch.Tensor, got list"),
    "ids elsewhere": ({"indices": torch.ones(3, 2).long().to("meta")}, ValueError, r"indices: expected on cpu.* meta"),
    "another K": ({"indices": torch.zeros(3, 1).long()}, ValueError, r"indices: expected shape \[N, K\].*got \(3, 1\)"),
    "one axis": ({"W_dec": rows(5)}, ValueError, r"W_dec: expected shape \[F, D\] or \[F, T, D\], got \(5,\)"),
    "bias of one target": (
        {"b_dec": rows(3)},
        ValueError,
        r"b_dec: expected shape \[D\] \(D=4 as in W_dec\), got \(3,\)",
    ),
    "another dtype": ({"W_dec": rows(5, 4).float()}, TypeError, r"W_dec: expected torch.float64"),
    "unknown backend": ({"backend": "x"}, ValueError, r"backend of sparse_decode: .*'reference', 'torch'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        sparse_decode(**inputs(3, 2, 5, (4,)) | change)
