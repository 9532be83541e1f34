"""The largest pre-activations of a batch: exact, ties, NaN, rows as long as they need, padding -1."""

import pytest
import torch
from harness import Guarded, assert_same_bits, assert_slots, rows, strided
from torch import Tensor

from csrc_triton import SCRATCH_BYTES
from csrc_triton import batchtopk_encode as kernels


def inputs(N: int, D: int, F: int) -> dict[str, Tensor]:
    return {"x": rows(N, D), "W_enc": rows(F, D, seed=1), "b_enc": rows(F, seed=2)}


def pre(x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
    return x.double() @ W_enc.double().T + b_enc.double()


def batch_kept(true: Tensor, total: int) -> Tensor:
    flat = true.relu().flatten()
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.sort(descending=True, stable=True).indices[:total]] = True
    return (kept & ~(flat <= 0)).view_as(true)


@pytest.mark.parametrize(
    ("k", "scratch_bytes"),
    [(1, 2000), (4, SCRATCH_BYTES), (60, 2000)],  # of 70 latents, about half positive
)
def test_keeps_the_largest_of_the_batch(k: int, scratch_bytes: int) -> None:
    case = inputs(9, 8, 70)
    case["x"][3] *= 20  # one token takes most of the slots, more than 4 k
    with Guarded():
        values, indices = kernels.forward(**case, k=k, scratch_bytes=scratch_bytes)
    true = pre(**case)
    assert_slots(values, indices, batch_kept(true, 9 * k), true)


@pytest.mark.parametrize("k", [2, 9])
def test_ties_go_to_the_first_token_and_the_lowest_latent(k: int) -> None:
    case = {name: value.round().clamp(-1, 1) for name, value in inputs(9, 3, 70).items()}
    true = pre(**case)
    for scratch_bytes in (SCRATCH_BYTES, 2000):
        values, indices = kernels.forward(**case, k=k, scratch_bytes=scratch_bytes)
        assert_slots(values, indices, batch_kept(true, 9 * k), true)


def test_keeps_nan_first() -> None:
    case = inputs(4, 3, 30)
    case["b_enc"][5] = -torch.nan
    values, indices = kernels.forward(**case, k=2, scratch_bytes=SCRATCH_BYTES)
    assert indices[:, 0].tolist() == [5] * 4 and bool(values[:, 0].isnan().all())
    assert int((indices >= 0).sum()) == 8 and int(values.isnan().sum()) == 4


def test_no_tokens() -> None:
    case = inputs(0, 4, 10)
    assert kernels.forward(**case, k=2, scratch_bytes=SCRATCH_BYTES)[0].shape == (0, 0)


def test_repeatable_and_strided() -> None:
    case = inputs(5, 6, 40)
    views = {name: strided(value) for name, value in case.items()}
    assert_same_bits(*(kernels.forward(**c, k=3, scratch_bytes=SCRATCH_BYTES) for c in (case, case, views)))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="k: expected from 1 to 5"):
        kernels.forward(**inputs(2, 3, 5), k=6, scratch_bytes=SCRATCH_BYTES)
