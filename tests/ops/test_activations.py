"""The activations "abstopk" and "groupmax" of topk_encode: which latents they select, and which have a gradient."""

import pytest
import torch
from op_helpers import (
    BACKENDS,
    DEVICE,
    assert_gradient_is_that_of_the_kept_values,
    encoder_inputs,
    outputs_and_gradients,
    pre_activations,
    rows,
)

from sparseclt.ops import topk_encode

ALL = ["reference", *BACKENDS]
D, F, K = 24, 37, 5


@pytest.mark.parametrize("backend", ALL)
def test_abstopk_keeps_the_sign(backend):
    case = encoder_inputs(k=K)
    pre = pre_activations(case)
    values, indices = topk_encode(**case, activation="abstopk", backend=backend)
    expected = pre.abs().topk(K).indices
    assert torch.equal(indices, expected) and (values < 0).any()
    torch.testing.assert_close(values, pre.gather(1, expected))


@pytest.mark.parametrize("k", [1, 5, 36, 37])
@pytest.mark.parametrize("backend", ALL)
def test_groupmax_takes_one_of_each_group_whatever_divides_what(backend, k):
    case = encoder_inputs(k=k)
    groups = [pre_activations(case)[:, g * F // k : (g + 1) * F // k].relu().max(1).values for g in range(k)]
    values, indices = topk_encode(**case, activation="groupmax", backend=backend)
    torch.testing.assert_close(values, torch.stack(groups, 1).sort(dim=1, descending=True).values)
    group_of = torch.tensor([g for g in range(k) for _ in range(g * F // k, (g + 1) * F // k)], device=DEVICE)
    for row, active in zip(group_of[indices], values > 0, strict=True):
        assert len(set(row[active].tolist())) == int(active.sum())


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("activation", ["abstopk", "groupmax"])
def test_the_gradient_is_that_of_the_kept_values_only(activation, backend):
    case = encoder_inputs()
    for leaf in case.values():
        leaf.requires_grad_()
    values, indices = topk_encode(**case, k=K, activation=activation, backend=backend)
    assert_gradient_is_that_of_the_kept_values(case, values, indices)


@pytest.mark.parametrize("activation", ["abstopk", "groupmax"])
@pytest.mark.parametrize("scratch_bytes", [1, 700, 1 << 22])
def test_the_chunk_changes_nothing(scratch_bytes, activation):
    case = encoder_inputs(k=K, activation=activation)
    truth = outputs_and_gradients(topk_encode, case, torch.float64, backend="reference")
    got = outputs_and_gradients(topk_encode, case, torch.float64, backend="torch", scratch_bytes=scratch_bytes)
    for quantity, expected in truth.items():
        torch.testing.assert_close(got[quantity], expected, msg=quantity)


@pytest.mark.parametrize("backend", ALL)
def test_no_tokens(backend):
    case = encoder_inputs(k=3, activation="groupmax") | {"x": rows(0, D).float()}
    assert [t.shape for t in topk_encode(**case, backend=backend)] == [(0, 3)] * 2


def test_an_unknown_activation_is_named():
    with pytest.raises(ValueError, match=r"activation: .*'groupmax', got 'relu'"):
        topk_encode(**encoder_inputs(k=2, activation="relu"))
    with pytest.raises(ValueError, match=r"scratch_bytes: expected at least 0"):
        topk_encode(**encoder_inputs(k=2, scratch_bytes=-1))
