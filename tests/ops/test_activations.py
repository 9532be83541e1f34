"""AbsTopK, GroupMax, BatchTopK and JumpReLU: what they select, and what has a gradient."""

import pytest
import torch
from op_helpers import BACKENDS, DEVICE, LargestAllocation, outputs_and_gradients, rows

from sparseclt.ops import batchtopk_encode, jumprelu_encode, sparse_decode, topk_encode

ALL = ["reference", *BACKENDS]
N, D, F, K = 13, 24, 37, 5


def inputs(**more):
    return {
        "x": rows(N, D, seed=1).float(),
        "W_enc": rows(F, D, seed=2).float() / D**0.5,
        "b_enc": rows(F, seed=3).float() * 0.1,
    } | more


def pre_activations(case):
    return case["x"] @ case["W_enc"].T + case["b_enc"]


def dense(values, indices):
    return torch.zeros(N, F, device=DEVICE).scatter_add(1, indices.clamp_min(0), values)


@pytest.mark.parametrize("backend", ALL)
def test_abstopk_keeps_the_sign(backend):
    case = inputs(k=K)
    pre = pre_activations(case)
    values, indices = topk_encode(**case, activation="abstopk", backend=backend)
    expected = pre.abs().topk(K).indices
    assert torch.equal(indices, expected) and (values < 0).any()
    torch.testing.assert_close(values, pre.gather(1, expected))


@pytest.mark.parametrize("k", [1, 5, 36, 37])
@pytest.mark.parametrize("backend", ALL)
def test_groupmax_takes_one_of_each_group_whatever_divides_what(backend, k):
    case = inputs(k=k)
    groups = [pre_activations(case)[:, g * F // k : (g + 1) * F // k].relu().max(1).values for g in range(k)]
    values, indices = topk_encode(**case, activation="groupmax", backend=backend)
    torch.testing.assert_close(values, torch.stack(groups, 1).sort(dim=1, descending=True).values)
    group_of = torch.tensor([g for g in range(k) for _ in range(g * F // k, (g + 1) * F // k)], device=DEVICE)
    for row, active in zip(group_of[indices], values > 0, strict=True):
        assert len(set(row[active].tolist())) == int(active.sum())


@pytest.mark.parametrize("backend", ALL)
def test_batchtopk_shares_the_budget_and_caps_no_row(backend):
    case = inputs(k=2)
    case["x"][3] *= 30  # this token outbids all others
    relu = pre_activations(case).relu()
    bar = relu.flatten().topk(2 * N).values[-1]
    values, indices = batchtopk_encode(**case, backend=backend)
    torch.testing.assert_close(dense(values, indices), torch.where(relu >= bar, relu, 0))
    lengths = (indices >= 0).sum(1)
    assert lengths.sum() == 2 * N and values.shape[1] == lengths.max() == lengths[3] > 4 * 2
    assert (values[:, :-1] >= values[:, 1:]).all() and (values[indices < 0] == 0).all()


@pytest.mark.parametrize("backend", ALL)
def test_batchtopk_with_too_few_positive_keeps_those(backend):
    case = inputs(k=30)
    case["b_enc"] -= 1.5
    relu = pre_activations(case).relu()
    values, indices = batchtopk_encode(**case, backend=backend)
    torch.testing.assert_close(dense(values, indices), relu)
    assert (indices >= 0).sum() == (relu > 0).sum() < 30 * N


@pytest.mark.parametrize("backend", ALL)
def test_jumprelu_is_the_pre_activation_above_the_threshold(backend):
    threshold = rows(F, seed=4).float().abs() * 0.3 + 0.2
    case = inputs(threshold=threshold)
    pre = pre_activations(case)
    values, indices, l0 = jumprelu_encode(**case, bandwidth=0.0, backend=backend)
    torch.testing.assert_close(dense(values, indices), pre * (pre > threshold))
    assert torch.equal(l0, (pre > threshold).sum(1).float())
    assert values.shape[1] == (pre > threshold).sum(1).max() and ((indices >= 0) == (values > 0)).all()


@pytest.mark.parametrize("backend", ALL)
def test_jumprelus_threshold_has_the_straight_through_gradient_through_a_decoder(backend):
    """Against the dense formula: also latents below their threshold, within the rectangle, must pull at it."""
    bandwidth, W_dec = 0.4, rows(F, 7, seed=5).float()
    threshold = (rows(F, seed=4).float().abs() * 0.3 + 0.3).requires_grad_()
    case = inputs(threshold=threshold)
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


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", ["abstopk", "groupmax", "batchtopk", "jumprelu"])
def test_the_gradient_is_that_of_the_kept_values_alone(name, backend):
    case = inputs()
    for leaf in case.values():
        leaf.requires_grad_()
    if name == "batchtopk":
        values, indices = batchtopk_encode(**case, k=K, backend=backend)
    elif name == "jumprelu":
        values, indices, _ = jumprelu_encode(**case, threshold=torch.full((F,), 0.8, device=DEVICE), backend=backend)
    else:
        values, indices = topk_encode(**case, k=K, activation=name, backend=backend)
    weights = rows(*values.shape, seed=9).float()
    got = torch.autograd.grad((values * weights).sum(), list(case.values()))
    kept = pre_activations(case).gather(1, indices.clamp_min(0)) * (values != 0)
    expected = torch.autograd.grad((kept * weights).sum(), list(case.values()))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    unused = torch.ones(F, dtype=torch.bool, device=DEVICE)
    unused[indices[values != 0]] = False
    assert unused.any() or name != "groupmax"
    assert (got[1][unused] == 0).all() and (got[2][unused] == 0).all()


@pytest.mark.parametrize("scratch_bytes", [1, 700, 1 << 22])
def test_the_chunk_changes_nothing(scratch_bytes):
    case = {name: tensor.double() for name, tensor in inputs().items()}
    threshold = torch.full((F,), 0.5, device=DEVICE, dtype=torch.float64)
    for op, more in (
        (topk_encode, {"k": K, "activation": "abstopk"}),
        (topk_encode, {"k": K, "activation": "groupmax"}),
        (batchtopk_encode, {"k": K}),
        (jumprelu_encode, {"threshold": threshold, "bandwidth": 0.3}),
    ):
        truth = outputs_and_gradients(op, case | more, torch.float64, backend="reference")
        got = outputs_and_gradients(op, case | more, torch.float64, backend="torch", scratch_bytes=scratch_bytes)
        for quantity, expected in truth.items():
            torch.testing.assert_close(got[quantity], expected, msg=f"{op.__name__} {quantity}")


@pytest.mark.parametrize("backend", ALL)
def test_no_tokens(backend):
    case = inputs() | {"x": rows(0, D).float()}
    threshold = torch.ones(F, device=DEVICE)
    assert [t.shape for t in topk_encode(**case, k=3, activation="groupmax", backend=backend)] == [(0, 3)] * 2
    assert [t.shape for t in batchtopk_encode(**case, k=3, backend=backend)] == [(0, 0)] * 2
    shapes = [t.shape for t in jumprelu_encode(**case, threshold=threshold, backend=backend)]
    assert shapes == [(0, 0), (0, 0), (0,)]


def test_the_pre_activations_of_all_tokens_never_exist():
    many, latents, k = 400, 3000, 2
    case = {"x": rows(many, 8), "W_enc": rows(latents, 8), "b_enc": None}
    threshold = torch.full((latents,), 9.0, device=DEVICE)
    for op, more in ((batchtopk_encode, {"k": k}), (jumprelu_encode, {"threshold": threshold})):
        with LargestAllocation() as largest:
            outputs_and_gradients(op, case | more, torch.float32, backend="torch", scratch_bytes=100_000)
        assert largest.elements <= 60_000 < many * latents / 10, largest.by


BAD = {
    "activation": (topk_encode, {"k": 2, "activation": "relu"}, ValueError, r"activation: .*'groupmax', got 'relu'"),
    "scratch": (topk_encode, {"k": 2, "scratch_bytes": -1}, ValueError, r"scratch_bytes: expected at least 0"),
    "k": (batchtopk_encode, {"k": 0}, ValueError, r"k: expected from 1 to F=37"),
    "threshold": (jumprelu_encode, {"threshold": torch.ones(3)}, ValueError, r"threshold: expected shape \[F\]"),
    "bandwidth": (
        jumprelu_encode,
        {"threshold": torch.ones(F), "bandwidth": -1.0},
        ValueError,
        r"bandwidth: .*at least 0",
    ),
}


@pytest.mark.parametrize(("op", "more", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(op, more, error, match):
    more = {n: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for n, v in more.items()}
    with pytest.raises(error, match=match):
        op(**inputs(), **more)
