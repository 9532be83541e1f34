"""BatchTopK: a budget of active latents that the tokens of a batch share."""

import pytest
import torch
from op_helpers import (
    BACKENDS,
    WIDE,
    LargestAllocation,
    assert_gradient_is_that_of_the_kept_values,
    assert_matches_reference,
    assert_repeatable,
    dense,
    encoder_inputs,
    outputs_and_gradients,
    pre_activations,
    rows,
)

from sparseclt.ops import batchtopk_encode

ALL = ["reference", *BACKENDS]
N, D, F, K = 13, 24, 37, 5


@pytest.mark.parametrize("backend", ALL)
def test_tokens_share_the_budget_and_caps_no_row(backend):
    case = encoder_inputs(k=2)
    case["x"][3] *= 30  # this token outbids all others
    relu = pre_activations(case).relu()
    bar = relu.flatten().topk(2 * N).values[-1]
    values, indices = batchtopk_encode(**case, backend=backend)
    torch.testing.assert_close(dense(values, indices, F), torch.where(relu >= bar, relu, 0))
    lengths = (indices >= 0).sum(1)
    assert lengths.sum() == 2 * N and values.shape[1] == lengths.max() == lengths[3] > 4 * 2
    assert (values[:, :-1] >= values[:, 1:]).all() and (values[indices < 0] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_with_too_few_positive_keeps_those(backend):
    case = encoder_inputs(k=30)
    case["b_enc"] -= 1.5
    relu = pre_activations(case).relu()
    values, indices = batchtopk_encode(**case, backend=backend)
    torch.testing.assert_close(dense(values, indices, F), relu)
    assert (indices >= 0).sum() == (relu > 0).sum() < 30 * N


@pytest.mark.parametrize("k", [1, 5, 36, 37])
def test_backends_equal_the_reference(k):
    assert_matches_reference(batchtopk_encode, encoder_inputs(k=k))


def test_backends_equal_the_reference_without_bias():
    assert_matches_reference(batchtopk_encode, encoder_inputs(k=K) | {"b_enc": None})


@pytest.mark.parametrize("scratch_bytes", [1, 700, 1 << 22])
def test_the_chunk_changes_nothing(scratch_bytes):
    case = encoder_inputs(k=K)
    truth = outputs_and_gradients(batchtopk_encode, case, torch.float64, backend="reference")
    got = outputs_and_gradients(batchtopk_encode, case, torch.float64, backend="torch", scratch_bytes=scratch_bytes)
    for quantity, expected in truth.items():
        torch.testing.assert_close(got[quantity], expected, msg=quantity)


@pytest.mark.parametrize("backend", ALL)
def test_the_gradient_is_that_of_the_kept_values_only(backend):
    case = encoder_inputs()
    for leaf in case.values():
        leaf.requires_grad_()
    assert_gradient_is_that_of_the_kept_values(case, *batchtopk_encode(**case, k=K, backend=backend))


@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_gradcheck(backend):
    leaves = [rows(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(4, 3), (7, 3), (7,)])]
    assert torch.autograd.gradcheck(lambda *t: batchtopk_encode(*t, 3, backend=backend)[0], leaves)


@pytest.mark.parametrize("backend", ALL)
def test_no_tokens(backend):
    case = encoder_inputs(k=3) | {"x": rows(0, D).float()}
    assert [t.shape for t in batchtopk_encode(**case, backend=backend)] == [(0, 0)] * 2


def test_the_pre_activations_of_all_tokens_never_exist():
    many, latents = 400, 3000
    case = {"x": rows(many, 8), "W_enc": rows(latents, 8), "b_enc": None, "k": 2}
    with LargestAllocation() as largest:
        outputs_and_gradients(batchtopk_encode, case, torch.float32, backend="torch", scratch_bytes=100_000)
    assert largest.elements <= 60_000 < many * latents / 10, largest.by


def test_repeatable():
    assert_repeatable(batchtopk_encode, encoder_inputs(64, 32, 500, k=16), scratch_bytes=20_000)


BAD = {
    "k too small": ({"k": 0}, ValueError, r"k: expected from 1 to F=37"),
    "k too large": ({"k": 38}, ValueError, r"k: expected from 1 to F=37 .*got 38"),
    "another D": ({"W_enc": rows(7, 5).float()}, ValueError, r"W_enc: expected shape \[F, D\] \(D=24 as in x\)"),
    "scratch": ({"scratch_bytes": -1}, ValueError, r"scratch_bytes: expected at least 0"),
    "unknown backend": ({"backend": "x"}, ValueError, r"backend of batchtopk_encode: .*'torch'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        batchtopk_encode(**encoder_inputs(k=2) | change)
