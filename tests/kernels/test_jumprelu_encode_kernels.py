"""Pre-activations above a threshold: exact, which slots are near it, rows as long as they need, padding -1."""

import pytest
import torch
from harness import DEVICE, Guarded, assert_same_bits, assert_slots, rows, strided
from torch import Tensor

from csrc_triton import SCRATCH_BYTES
from csrc_triton import jumprelu_encode as kernels


def inputs(N: int, D: int, F: int) -> dict[str, Tensor]:
    return {"x": rows(N, D), "W_enc": rows(F, D, seed=1), "b_enc": rows(F, seed=2)}


def pre(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return x.double() @ W_enc.double().T + b_enc.double()


def encode(
    case: dict[str, Tensor], threshold: Tensor, bandwidth: float = 0.0, scratch_bytes: int = SCRATCH_BYTES
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels.forward(*case.values(), threshold, bandwidth, scratch_bytes)


@pytest.mark.parametrize(("bandwidth", "scratch_bytes"), [(0.0, 2000), (0.8, SCRATCH_BYTES)])
def test_keeps_the_latents_above_their_threshold_and_near_it(bandwidth: float, scratch_bytes: int) -> None:
    case, threshold = inputs(9, 8, 70), rows(70, seed=3)
    threshold = (8 * threshold).round() / 8
    with Guarded():
        values, indices, within = encode(case, threshold, bandwidth, scratch_bytes)
    true, limit = pre(**case), threshold.double()
    active = (true > limit) & (true > 0)
    near = (true - limit).abs() < bandwidth / 2
    assert_slots(values, indices, active | near, torch.where(active, true, 0))
    assert bool(within.any()) == (bandwidth > 0)


def test_near_slots_are_within_half_a_bandwidth_of_their_threshold() -> None:
    case, threshold, bandwidth = inputs(6, 5, 20), rows(20, seed=3).abs(), 0.9
    values, indices, within = encode(case, threshold, bandwidth)
    true, limit = pre(**case), threshold.double()
    near = (true - limit).abs() < bandwidth / 2
    assert bool((near & (true <= limit)).any()) and bool((near & (true > limit)).any())
    rows_of = torch.arange(6, device=DEVICE)[:, None].expand_as(indices)
    found = torch.zeros_like(near)
    found[rows_of[within], indices[within]] = True
    assert torch.equal(found, near)


def test_no_slots_at_all() -> None:
    values, indices, within = encode(inputs(3, 4, 10), torch.full((10,), 1e6, device=DEVICE))
    assert values.shape == indices.shape == within.shape == (3, 0)


def test_repeatable_and_strided() -> None:
    case, threshold = inputs(5, 6, 40), rows(40, seed=3).abs()
    views = {name: strided(value) for name, value in case.items()}
    assert_same_bits(encode(case, threshold, 0.5), encode(views, strided(threshold), 0.5))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="threshold: expected shape"):
        encode(inputs(2, 3, 5), torch.ones(4, device=DEVICE))
