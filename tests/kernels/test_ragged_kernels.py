"""batchtopk and jumprelu: exact, rows as long as they need, values descending, padding -1; gradients."""

import pytest
import torch
from harness import DEVICE, Guarded, assert_same_bits, rows, strided
from torch import Tensor

from csrc_triton import ragged as kernels


def inputs(N: int, D: int, F: int) -> dict[str, Tensor]:
    return {"x": rows(N, D), "W_enc": rows(F, D, seed=1), "b_enc": rows(F, seed=2)}


def pre(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return x.double() @ W_enc.double().T + b_enc.double()


def assert_slots(values: Tensor, indices: Tensor, kept: Tensor, true: Tensor) -> None:
    """Slots are the `kept` [N, F] latents with their `true` values, descending, ties by index, then padding."""
    assert values.shape == indices.shape == (len(kept), int(kept.sum(1).max()))
    for n, row in enumerate(kept):
        ids = row.nonzero().flatten()
        ids = ids[true[n, ids].sort(descending=True, stable=True).indices]
        assert indices[n, : len(ids)].tolist() == ids.tolist()
        assert bool((indices[n, len(ids) :] == -1).all()) and not values[n, len(ids) :].any()
        torch.testing.assert_close(values[n, : len(ids)].double(), true[n, ids], rtol=0, atol=1e-5, equal_nan=True)


def batch_kept(true: Tensor, total: int) -> Tensor:
    flat = true.relu().flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:total]] = True
    return (kept & ~(flat <= 0)).view_as(true)


@pytest.mark.parametrize(
    ("k", "scratch_bytes"),
    [(1, 2000), (4, 64 << 20), (60, 2000)],  # of 70 latents, about half positive
)
def test_batchtopk_keeps_the_largest_of_the_batch(k: int, scratch_bytes: int) -> None:
    case = inputs(9, 8, 70)
    case["x"][3] *= 20  # one token takes most of the slots, more than 4 k
    with Guarded():
        values, indices = kernels.batchtopk(**case, k=k, scratch_bytes=scratch_bytes)
    true = pre(**case)
    assert_slots(values, indices, batch_kept(true, 9 * k), true)


@pytest.mark.parametrize("k", [2, 9])
def test_batchtopk_ties_go_to_the_first_token_and_the_lowest_latent(k: int) -> None:
    case = {name: value.round().clamp(-1, 1) for name, value in inputs(9, 3, 70).items()}
    true = pre(**case)
    for scratch_bytes in (64 << 20, 2000):
        values, indices = kernels.batchtopk(**case, k=k, scratch_bytes=scratch_bytes)
        assert_slots(values, indices, batch_kept(true, 9 * k), true)


def test_batchtopk_keeps_nan_first() -> None:
    case = inputs(4, 3, 30)
    case["b_enc"][5] = -torch.nan
    values, indices = kernels.batchtopk(**case, k=2)
    assert indices[:, 0].tolist() == [5] * 4 and bool(values[:, 0].isnan().all())
    assert int((indices >= 0).sum()) == 8 and int(values.isnan().sum()) == 4


@pytest.mark.parametrize(("bandwidth", "scratch_bytes"), [(0.0, 2000), (0.8, 64 << 20)])
def test_jumprelu_keeps_what_is_above_its_threshold(bandwidth: float, scratch_bytes: int) -> None:
    case, threshold = inputs(9, 8, 70), rows(70, seed=3)
    threshold = (8 * threshold).round() / 8
    with Guarded():
        values, indices = kernels.jumprelu(
            **case, threshold=threshold, scratch_bytes=scratch_bytes, bandwidth=bandwidth
        )
    true, limit = pre(**case), threshold.double()
    active = (true > limit) & (true > 0)
    near = (true - limit).abs() < bandwidth / 2
    assert_slots(values, indices, active | near, torch.where(active, true, 0))


def test_jumprelu_gradients_are_straight_through() -> None:
    case, threshold, bandwidth = inputs(6, 5, 20), rows(20, seed=3).abs(), 0.9
    values, indices = kernels.jumprelu(**case, threshold=threshold, bandwidth=bandwidth)
    grad = rows(*values.shape, seed=4)
    with Guarded():
        ours = kernels.jumprelu_backward(grad, values, indices, case["x"], case["W_enc"], threshold, bandwidth)
    true, limit = pre(**case), threshold.double()
    dense = torch.zeros(6, 20, dtype=torch.float64, device=DEVICE)
    dense.scatter_add_(1, indices.clamp_min(0), grad.double().masked_fill(indices < 0, 0))
    active = dense * (true > limit)
    near = (true - limit).abs() < bandwidth / 2
    expected = [
        active @ case["W_enc"].double(),
        active.T @ case["x"].double(),
        active.sum(0),
        (-limit / bandwidth * dense * near).sum(0),
    ]
    assert bool((near & (true <= limit)).any())
    for gradient, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=1e-5)


def test_no_slots_at_all() -> None:
    case = inputs(3, 4, 10)
    values, indices = kernels.jumprelu(**case, threshold=torch.full((10,), 1e6, device=DEVICE))
    assert values.shape == indices.shape == (3, 0)
    gradients = kernels.jumprelu_backward(
        values, values, indices, case["x"], case["W_enc"], torch.ones(10, device=DEVICE), 0.1
    )
    assert all(not gradient.any() for gradient in gradients)
    case["x"] = case["x"][:0]
    assert kernels.batchtopk(**case, k=2)[0].shape == (0, 0)


def test_repeatable_and_strided() -> None:
    case, threshold = inputs(5, 6, 40), rows(40, seed=3).abs()
    views = {name: strided(value) for name, value in case.items()}
    assert_same_bits(*(kernels.batchtopk(**c, k=3) for c in (case, case, views)))
    assert_same_bits(
        kernels.jumprelu(**case, threshold=threshold), kernels.jumprelu(**views, threshold=strided(threshold))
    )


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="threshold: expected shape"):
        kernels.jumprelu(**inputs(2, 3, 5), threshold=torch.ones(4, device=DEVICE))
    with pytest.raises(ValueError, match="k: expected from 1 to 5"):
        kernels.batchtopk(**inputs(2, 3, 5), k=6)
