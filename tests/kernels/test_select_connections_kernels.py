"""The C most important upstream latents: against the dense formula, with heads, ties, pieces and NaN."""

import pytest
import torch
from harness import DTYPES, Guarded, assert_same_bits, rows, strided
from torch import Tensor

from csrc_triton import SCRATCH_BYTES
from csrc_triton import select_connections as kernels

TINY = 9000  # bytes: blocks of few latents, upstream in pieces of 128


def inputs(H: int, F: int, U: int, D: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "W_enc": rows(H, F, D, dtype=dtype),
        "E": rows(U, D, dtype=dtype, seed=1),
        "importance": rows(U, dtype=dtype, seed=2).abs(),
    }


def scores(W_enc: Tensor, E: Tensor, importance: Tensor) -> Tensor:
    return importance.double() * (W_enc.double() @ E.double().T).norm(dim=0)


def best(scores: Tensor, C: int) -> Tensor:
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :C]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("scratch_bytes", [SCRATCH_BYTES, TINY], ids=["whole", "pieces"])
def test_matches_the_dense_formula(heads: int, dtype: torch.dtype, scratch_bytes: int) -> None:
    case = inputs(heads, 9, 200, 14, dtype)
    with Guarded():
        connections = kernels.forward(**case, C=7, scratch_bytes=scratch_bytes)
    assert connections.dtype == torch.int64
    assert torch.equal(connections, best(scores(**case), 7))


@pytest.mark.parametrize("scratch_bytes", [SCRATCH_BYTES, TINY], ids=["whole", "pieces"])
def test_an_importance_for_each_pair(scratch_bytes: int) -> None:
    case = inputs(1, 9, 200, 14)
    case["importance"] = rows(9, 200, seed=3).abs()
    with Guarded():
        connections = kernels.forward(**case, C=7, scratch_bytes=scratch_bytes)
    assert torch.equal(connections, best(scores(**case), 7))


@pytest.mark.parametrize("C", [1, 6, 40])
def test_ties_go_to_the_lowest_id(C: int) -> None:
    case = {name: value.round().clamp(-1, 1) for name, value in inputs(1, 5, 40, 3).items()}
    assert torch.equal(kernels.forward(**case, C=C, scratch_bytes=SCRATCH_BYTES), best(scores(**case), C))


def test_nan_is_kept_and_zero_importance_comes_last() -> None:
    case = inputs(1, 4, 30, 5)
    case["importance"][11] = torch.nan
    case["importance"][:3] = 0
    connections = kernels.forward(**case, C=30, scratch_bytes=SCRATCH_BYTES)
    assert bool((connections[:, 0] == 11).all())
    assert connections[:, -3:].tolist() == [[0, 1, 2]] * 4


def test_strided_inputs_and_no_latents() -> None:
    case = inputs(2, 4, 30, 5)
    views = {name: strided(value) for name, value in case.items()}
    assert_same_bits(
        kernels.forward(**case, C=3, scratch_bytes=SCRATCH_BYTES),
        kernels.forward(**views, C=3, scratch_bytes=SCRATCH_BYTES),
    )
    assert kernels.forward(**case | {"W_enc": case["W_enc"][:, :0]}, C=3, scratch_bytes=SCRATCH_BYTES).shape == (0, 3)


def test_bad_input_is_named() -> None:
    case = inputs(1, 4, 30, 5)
    for C in (0, 31):
        with pytest.raises(ValueError, match="C: expected from 1 to 30"):
            kernels.forward(**case, C=C, scratch_bytes=SCRATCH_BYTES)
    with pytest.raises(TypeError, match="float64"):
        kernels.forward(**case | {"E": case["E"].double()}, C=3, scratch_bytes=SCRATCH_BYTES)
    with pytest.raises(TypeError, match="dtype of W_enc"):
        kernels.forward(**case | {"E": case["E"].half()}, C=3, scratch_bytes=SCRATCH_BYTES)
