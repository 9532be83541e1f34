"""JumpReLU: a threshold per latent, with a straight-through gradient."""

import pytest
import torch
from op_helpers import (
    BACKENDS,
    DEVICE,
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

from sparseclt.ops import jumprelu_encode, sparse_decode

ALL = ["reference", *BACKENDS]
N, D, F = 13, 24, 37


@pytest.mark.parametrize("backend", ALL)
def test_values_are_the_pre_activation_above_the_threshold(backend):
    threshold = rows(F, seed=4).float().abs() * 0.3 + 0.2
    case = encoder_inputs(threshold=threshold)
    pre = pre_activations(case)
    values, indices, l0 = jumprelu_encode(**case, bandwidth=0.0, backend=backend)
    torch.testing.assert_close(dense(values, indices, F), pre * (pre > threshold))
    assert torch.equal(l0, (pre > threshold).sum(1).float())
    assert values.shape[1] == (pre > threshold).sum(1).max() and ((indices >= 0) == (values > 0)).all()


@pytest.mark.parametrize("backend", ALL)
def test_the_threshold_has_the_straight_through_gradient_through_a_decoder(backend):
    """Against the dense formula: also latents below their threshold, within the rectangle, must pull at it."""
    bandwidth, W_dec = 0.4, rows(F, 7, seed=5).float()
    threshold = (rows(F, seed=4).float().abs() * 0.3 + 0.3).requires_grad_()
    case = encoder_inputs(threshold=threshold)
    pre, target, price = pre_activations(case), rows(N, 7, seed=6).float(), 0.1

    values, indices, l0 = jumprelu_encode(**case, bandwidth=bandwidth, backend=backend)
    ours = (sparse_decode(values, indices, W_dec) - target).square().sum() + price * l0.sum()
    (grad,) = torch.autograd.grad(ours, threshold)

    at = threshold.detach()
    active, within = pre > at, (pre - at).abs() < bandwidth / 2
    residual = 2 * ((pre * active) @ W_dec - target)
    expected = (within * (-at / bandwidth * (residual @ W_dec.T) - price / bandwidth)).sum(0)
    assert (within & ~active).any() and (within & active).any()
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


def thresholds():
    return rows(F, seed=4).abs().float() * 0.3 + 0.3


@pytest.mark.parametrize("bandwidth", [0.0, 0.3])
def test_backends_equal_the_reference(bandwidth):
    assert_matches_reference(jumprelu_encode, encoder_inputs(threshold=thresholds(), bandwidth=bandwidth))


@pytest.mark.parametrize("scratch_bytes", [1, 700, 1 << 22])
def test_the_chunk_changes_nothing(scratch_bytes):
    case = encoder_inputs(threshold=torch.full((F,), 0.5, device=DEVICE), bandwidth=0.3)
    truth = outputs_and_gradients(jumprelu_encode, case, torch.float64, backend="reference")
    got = outputs_and_gradients(jumprelu_encode, case, torch.float64, backend="torch", scratch_bytes=scratch_bytes)
    for quantity, expected in truth.items():
        torch.testing.assert_close(got[quantity], expected, msg=quantity)


@pytest.mark.parametrize("backend", ALL)
def test_the_gradient_is_that_of_the_kept_values_only(backend):
    case = encoder_inputs()
    for leaf in case.values():
        leaf.requires_grad_()
    threshold = torch.full((F,), 0.8, device=DEVICE)
    assert_gradient_is_that_of_the_kept_values(case, *jumprelu_encode(**case, threshold=threshold, backend=backend)[:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_threshold_that_only_l0_reads_has_its_gradient(backend):
    case, bandwidth = encoder_inputs(threshold=thresholds().requires_grad_()), 0.4
    l0 = jumprelu_encode(**case, bandwidth=bandwidth, backend=backend)[2]
    (grad,) = torch.autograd.grad(l0.sum(), case["threshold"])
    within = (pre_activations(case) - case["threshold"]).abs() < bandwidth / 2
    assert within.any()
    torch.testing.assert_close(grad, -within.sum(0).float() / bandwidth)


@pytest.mark.parametrize("backend", ALL)
def test_no_tokens(backend):
    case = encoder_inputs(threshold=torch.ones(F, device=DEVICE)) | {"x": rows(0, D).float()}
    assert [t.shape for t in jumprelu_encode(**case, backend=backend)] == [(0, 0), (0, 0), (0,)]


def test_the_pre_activations_of_all_tokens_never_exist():
    many, latents = 400, 3000
    case = {"x": rows(many, 8), "W_enc": rows(latents, 8), "b_enc": None}
    case["threshold"] = torch.full((latents,), 9.0, device=DEVICE)
    with LargestAllocation() as largest:
        outputs_and_gradients(jumprelu_encode, case, torch.float32, backend="torch", scratch_bytes=100_000)
    assert largest.elements <= 60_000 < many * latents / 10, largest.by


def test_repeatable():
    case = encoder_inputs(64, 32, 500, threshold=torch.full((500,), 0.5, device=DEVICE), bandwidth=0.3)
    assert_repeatable(jumprelu_encode, case, scratch_bytes=20_000)


BAD = {
    "another F": ({"threshold": torch.ones(3)}, ValueError, r"threshold: expected shape \[F\]"),
    "another dtype": ({"threshold": torch.ones(F).double()}, TypeError, r"threshold: expected torch.float32"),
    "bandwidth": ({"bandwidth": -1.0}, ValueError, r"bandwidth: .*at least 0, got -1.0"),
    "NaN": ({"bandwidth": float("nan")}, ValueError, r"bandwidth: .*at least 0, got nan"),
    "unknown backend": ({"backend": "x"}, ValueError, r"backend of jumprelu_encode: .*'torch'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    change = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in change.items()}
    with pytest.raises(error, match=match):
        jumprelu_encode(**encoder_inputs(threshold=torch.ones(F, device=DEVICE)) | change)
