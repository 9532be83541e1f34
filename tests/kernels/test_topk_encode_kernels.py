"""Encoders with k latents per token: exact values, order, ties, NaN, budget; gradients of active slots only."""

import pytest
import torch
from harness import (
    DEVICE,
    DTYPES,
    Guarded,
    assert_accurate,
    assert_same_bits,
    rows,
    strided,
    transposed,
    truth_and_peer,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from csrc_triton import SCRATCH_BYTES, place, select, stream
from csrc_triton import topk_encode as kernels
from sparseclt.ops import topk_encode

TINY = 9000  # bytes: blocks of few tokens, rows in pieces of 128 latents


def inputs(N: int, D: int, F: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "x": rows(N, D, dtype=dtype),
        "W_enc": rows(F, D, dtype=dtype, seed=1),
        "b_enc": rows(F, dtype=dtype, seed=2),
    }


def with_ties(N: int = 6, D: int = 3, F: int = 300) -> dict[str, Tensor]:
    """Small integers: pre-activations are exact, and most of them equal to many others."""
    return {name: value.round().clamp(-1, 1) for name, value in inputs(N, D, F).items()}


def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    activation: str = "topk",
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    return kernels.forward(x, W_enc, b_enc, k, activation, scratch_bytes)


def gradients(grad: Tensor, values: Tensor, indices: Tensor, case: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    return kernels.backward(grad, values, indices, case["x"], case["W_enc"], (True, True, True))


def expected(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, activation: str = "topk") -> tuple[Tensor, Tensor]:
    """By a stable sort of exact pre-activations: ties to the lowest index."""
    pre = x.double() @ W_enc.double().T + b_enc.double()
    F = pre.shape[1]
    if activation == "groupmax":
        runs = [(g * F // k, (g + 1) * F // k) for g in range(k)]
        best = torch.stack([a + pre[:, a:b].argmax(1) for a, b in runs], 1)
        order = best.gather(1, pre.gather(1, best).sort(dim=1, descending=True, stable=True).indices)
    else:
        key = pre.abs() if activation == "abstopk" else pre
        order = key.sort(dim=1, descending=True, stable=True).indices[:, :k]
    values = pre.gather(1, order)
    return values if activation == "abstopk" else values.relu(), order


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_of_many_latents(dtype: torch.dtype) -> None:
    case = inputs(20, 40, 300, dtype)
    truth, peer = truth_and_peer(topk_encode, case, k=8)
    with Guarded():
        values, indices = encode(**case, k=8)
    assert_accurate(values, peer["out0"], truth["out0"], "values")
    assert torch.equal(indices, truth["out1"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6, 17, 33, 5), (3, 9, 10, 10), (2, 1, 1, 1)], ids=str)
def test_matches_the_reference_with_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    N, D, F, K = shape
    case = inputs(N, D, F, dtype)
    truth, peer = truth_and_peer(topk_encode, case, k=K)
    with Guarded():
        values, indices = encode(**case, k=K)
        grads = gradients(truth["cotangent"], values, indices, case)
    assert_accurate(values, peer["out0"], truth["out0"], "values")
    chosen = values > 0
    assert torch.equal(indices[chosen], truth["out1"][chosen])
    for name, ours in zip(case, grads, strict=True):
        assert_accurate(ours, peer[name], truth[name], name)


@pytest.mark.parametrize("activation", kernels.ACTIVATIONS)
@pytest.mark.parametrize(("k", "scratch_bytes"), [(1, SCRATCH_BYTES), (8, TINY), (50, SCRATCH_BYTES)], ids=str)
def test_ties_go_to_the_lowest_index(k: int, activation: str, scratch_bytes: int) -> None:
    case = with_ties()
    with Guarded():
        values, indices = encode(**case, k=k, scratch_bytes=scratch_bytes, activation=activation)
    true_values, true_indices = expected(**case, k=k, activation=activation)
    assert torch.equal(values.double(), true_values)
    assert torch.equal(indices, true_indices)


def test_long_lists_are_sorted_to_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "LONG", 4)
    case = with_ties()
    for activation in kernels.ACTIVATIONS:
        values, indices = encode(**case, k=9, activation=activation)
        true_values, true_indices = expected(**case, k=9, activation=activation)
        assert torch.equal(values.double(), true_values) and torch.equal(indices, true_indices)


def test_rows_longer_than_a_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "MAX_BLOCK", 64)
    case = with_ties(2, 3, 150)
    values, indices = encode(**case, k=30)
    true_values, true_indices = expected(**case, k=30)
    assert torch.equal(values.double(), true_values) and torch.equal(indices, true_indices)


def test_one_warp_holds_a_row_and_compacts_it_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "INTERPRETED", False)
    monkeypatch.setattr(select, "COMPACTED", 32)
    assert select.select_config(150).part == 32 < select.select_config(150).block
    for k in (5, 30):  # with and without groups
        case = with_ties(3, 3, 150)
        values, indices = encode(**case, k=k)
        true_values, true_indices = expected(**case, k=k)
        assert torch.equal(values.double(), true_values) and torch.equal(indices, true_indices)


def test_columns_past_the_end_do_not_lift_the_last_group() -> None:
    case = inputs(4, 5, 300)
    case["x"] = case["x"].abs()
    case["W_enc"][299], case["b_enc"][296:] = 50.0, -1000.0  # without its bias the last latent would win
    values, indices = encode(**case, k=2)
    true_values, true_indices = expected(**case, k=2)
    assert torch.equal(indices, true_indices) and (values - true_values).abs().max() < 1e-5


def test_nan_and_infinity_come_first() -> None:
    case = inputs(4, 5, 300)  # TINY: in pieces
    case["x"][1] = torch.nan
    case["b_enc"][[7, 299]] = torch.tensor([torch.nan, -torch.nan])
    case["b_enc"][200] = torch.inf
    case["b_enc"][3] = -torch.inf
    values, indices = encode(**case, k=5, scratch_bytes=TINY)
    assert indices[[0, 2, 3], :3].tolist() == [[7, 299, 200]] * 3
    assert indices[1].tolist() == [0, 1, 2, 3, 4] and bool(values[1].isnan().all())
    assert bool(values[0, :2].isnan().all()) and values[0, 2] == torch.inf
    assert not values[0, 3:].isnan().any()


def test_rows_with_few_positives_have_no_gradient_elsewhere() -> None:
    """Earlier fused encoders let gradient through selected latents that relu had cut off."""
    case = inputs(6, 8, 20)
    case["b_enc"] -= 3.0
    values, indices = encode(**case, k=10)
    assert bool(((values > 0).sum(1) < 10).all()) and bool((values > 0).any())
    grad = rows(6, 10, seed=5)
    dx, dW, db = gradients(grad, values, indices, case)
    active = torch.zeros(20, device=DEVICE).index_add_(0, indices[values > 0], grad[values > 0])
    assert torch.equal(db != 0, active != 0)
    assert not dW[active == 0].any() and not dx[(values > 0).sum(1) == 0].any()


def test_an_infinite_row_behind_an_inactive_slot_does_no_harm() -> None:
    case = inputs(3, 4, 12)
    values, indices = encode(**case, k=12)
    dead = indices[0, -1]
    assert values[0, -1] == 0
    case["W_enc"][dead] = torch.inf
    active = values.clone()
    active[indices == dead] = 0
    dx, _, _ = gradients(rows(3, 12), active, indices, case)
    assert bool(dx.isfinite().all())


def test_strided_inputs_and_the_transposed_encoder() -> None:
    case = inputs(7, 12, 30)
    plain = encode(**case, k=6)
    grad = rows(7, 6, seed=4)
    grads = gradients(grad, *plain, case)
    for view in (strided, lambda t: transposed(t) if t.ndim == 2 else strided(t)):
        case_view = {name: view(value) for name, value in case.items()}
        with Guarded():
            outputs = encode(**case_view, k=6)
            again = gradients(strided(grad), *outputs, case_view)
        assert_same_bits(plain + grads, outputs + again)


def test_nothing_to_encode_and_no_bias() -> None:
    case = inputs(0, 4, 9)
    values, indices = encode(**case, k=3)
    assert values.shape == indices.shape == (0, 3)
    dx, dW, db = gradients(values, values, indices, case)
    assert dx.shape == (0, 4) and not dW.any() and not db.any()
    case = inputs(3, 0, 9)
    values, indices = encode(case["x"], case["W_enc"], None, 3)
    assert not values.any() and indices.tolist() == [[0, 1, 2]] * 3


def test_repeatable_and_independent_of_the_tokens_order() -> None:
    """With numbers whose sums are exact: the interpreter's BLAS rounds a row by its place in the tile."""
    case = inputs(20, 24, 300)
    assert_same_bits(*(encode(**case, k=8) for _ in range(3)))
    case = {name: (8 * value).round() / 8 for name, value in case.items()}
    first = encode(**case, k=8)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    values, indices = encode(**case | {"x": case["x"][order]}, k=8)
    assert_same_bits(first, (values[order.argsort()], indices[order.argsort()]))


class Allocated(TorchFunctionMode):
    """Adds up the bytes of the buffers made while active."""

    total = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.zeros, Tensor.new_empty):
            self.total += out.numel() * out.element_size()
        return out


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_scratch_stays_within_the_budget(activation: str) -> None:
    case = inputs(16, 4, 300)
    with Allocated() as allocated:
        values, indices = encode(**case, k=4, scratch_bytes=TINY, activation=activation)
    outputs = 16 * 4 * (4 + 8)
    assert allocated.total - outputs <= TINY < 16 * 300 * 4 // 2
    assert (values - expected(**case, k=4, activation=activation)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("F", [1, 300, 16_384, 1 << 20])
def test_blocks_fit_the_budget_and_cover_everything(F: int) -> None:
    for k in (1, 32, 2000, F):
        for budget in (1000, 1 << 20, 64 << 20):
            if k > F:
                continue
            blocks = stream.plan(4096, F, k, budget)
            assert blocks.pieces * blocks.columns >= F and min(k, F) <= blocks.columns
            assert blocks.rows == 1 or blocks.rows * blocks.columns * 4 <= budget


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 0}, ValueError, "k: expected from 1 to 9"),
        ({"k": 10}, ValueError, "k: expected from 1 to 9"),
        ({"activation": "softmax"}, ValueError, "activation"),
        ({"x": torch.zeros(2, 4, dtype=torch.float64, device=DEVICE)}, TypeError, "float64"),
        ({"x": torch.zeros(2, 4, dtype=torch.float16, device=DEVICE)}, TypeError, "dtype of x"),
        ({"x": torch.zeros(2, 5, device=DEVICE)}, ValueError, "x: expected shape"),
        ({"b_enc": torch.zeros(2, device=DEVICE)}, ValueError, "b_enc: expected shape"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        encode(**inputs(2, 4, 9) | {"k": 2} | change)


@pytest.mark.parametrize("activation", ["abstopk", "groupmax"])
def test_other_activations_with_gradients(activation: str) -> None:
    case = inputs(7, 12, 30)
    leaves = {name: value.double().requires_grad_() for name, value in case.items()}
    with Guarded():
        values, indices = encode(**case, k=6, activation=activation)
        grad = rows(7, 6, seed=4)
        grads = gradients(grad, values, indices, case)
    pre = leaves["x"] @ leaves["W_enc"].T + leaves["b_enc"]
    true_values, true_indices = expected(**case, k=6, activation=activation)
    assert torch.equal(indices, true_indices)
    assert (values - true_values).abs().max() < 1e-5
    out = pre.gather(1, indices)
    out = out if activation == "abstopk" else out.relu()
    for ours, true in zip(grads, torch.autograd.grad(out, list(leaves.values()), grad.double()), strict=True):
        assert (ours - true).abs().max() < 1e-5
