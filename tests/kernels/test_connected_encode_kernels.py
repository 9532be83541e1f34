"""Sparsely-connected encode: against the dense formula, with every gradient, ties, chunks, and no upstream at all."""

from typing import Any

import pytest
import torch
from harness import (
    DEVICE,
    DTYPES,
    Guarded,
    assert_accurate,
    assert_same_bits,
    distinct_ids,
    ids,
    rows,
    strided,
    truth_and_peer,
)
from torch import Tensor

from csrc_triton import SCRATCH_BYTES
from csrc_triton import connected_encode as kernels
from csrc_triton.transpose import transpose
from sparseclt.ops import connected_encode

GRADIENTS = ["r0", "W_enc", "b_enc", "z_values", "V"]


def inputs(N: int, D: int, F: int, S: int, C: int, U: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    connections = distinct_ids(F, C, count=U)
    return {
        "r0": rows(N, D, dtype=dtype),
        "W_enc": rows(F, D, dtype=dtype, seed=1),
        "b_enc": rows(F, dtype=dtype, seed=2),
        "z_values": rows(N, S, dtype=dtype, seed=3),
        "z_indices": ids(N, S, count=U),
        "V": rows(F, C, dtype=dtype, seed=4) * (connections >= 0),
        "connections": connections,
        "scale": rows(N, dtype=dtype, seed=5).abs() + 0.5,
    }


def run(case: dict[str, Tensor], k: int, U: int, scratch_bytes: int = SCRATCH_BYTES) -> tuple[Tensor, Tensor]:
    order, starts = transpose(case["connections"], U)
    return kernels.forward(**case, order=order, starts=starts, upstream=U, k=k, scratch_bytes=scratch_bytes)


def gradients(case: dict[str, Tensor], grad: Tensor, values: Tensor, indices: Tensor, U: int) -> dict[str, Any]:
    order, starts = transpose(case["connections"], U)
    arguments = {name: value for name, value in case.items() if name != "b_enc"}
    arguments |= {"order": order, "starts": starts, "upstream": U, "scratch_bytes": SCRATCH_BYTES}
    ours = kernels.backward(grad, values, indices, **arguments, needed=[True] * 5)
    return dict(zip(GRADIENTS, ours, strict=True))


@pytest.mark.parametrize(
    ("dtype", "scratch_bytes"), [(d, 700) for d in DTYPES] + [(torch.float32, SCRATCH_BYTES)], ids=str
)
def test_matches_the_reference_with_gradients(dtype: torch.dtype, scratch_bytes: int) -> None:
    N, D, F, S, C, U, K = 6, 9, 24, 7, 4, 9, 4
    case = inputs(N, D, F, S, C, U, dtype)
    truth, peer = truth_and_peer(connected_encode, case, k=K, upstream=U)
    with Guarded():
        values, indices = run(case, K, U, scratch_bytes)
        ours = gradients(case, truth["cotangent"], values, indices, U)
    assert_accurate(values, peer["out0"], truth["out0"], "values")
    assert torch.equal(indices[values > 0], truth["out1"][values > 0])
    for name in GRADIENTS:
        assert_accurate(ours[name], peer[name], truth[name], name)


def test_more_slots_and_reads_than_a_tile_holds() -> None:
    N, D, F, S, C, U, K = 3, 4, 10, 70, 17, 40, 5  # duplicates: 70 slots name 40 latents
    case = inputs(N, D, F, S, C, U)
    truth, peer = truth_and_peer(connected_encode, case, k=K, upstream=U)
    with Guarded():
        values, indices = run(case, K, U)
        ours = gradients(case, truth["cotangent"], values, indices, U)
    assert_accurate(values, peer["out0"], truth["out0"], "values")
    for name in GRADIENTS:
        assert_accurate(ours[name], peer[name], truth[name], name)


def test_groups_of_many_latents_see_the_upstream_part() -> None:
    case = inputs(5, 4, 600, 6, 3, 8)
    values, indices = run(case, 4, 8)
    truth = connected_encode(**{n: t.double() if t.is_floating_point() else t for n, t in case.items()}, k=4,
                             upstream=8, backend="reference")  # fmt: skip
    assert torch.equal(indices, truth[1]) and (values - truth[0]).abs().max() < 1e-5


def test_gradients_are_zero_outside_active_slots_and_kept_connections() -> None:
    N, D, F, S, C, U, K = 4, 6, 20, 5, 4, 9, 7
    case = inputs(N, D, F, S, C, U)
    case["b_enc"] -= 3.0
    values, indices = run(case, K, U)
    assert bool(((values > 0).sum(1) < K).any()) and bool((values > 0).any())
    ours = gradients(case, rows(N, K, seed=7), values, indices, U)
    unused = torch.ones(F, dtype=torch.bool, device=DEVICE)
    unused[indices[values > 0]] = False
    for name in ("W_enc", "b_enc", "V"):
        assert not ours[name][unused].any(), name
    assert ours["V"].any() and not ours["V"][case["connections"] < 0].any()
    assert not ours["z_values"][case["z_indices"] < 0].any()


@pytest.mark.parametrize(("S", "C", "U"), [(0, 0, 0), (0, 3, 5), (4, 0, 5)])
def test_without_upstream_it_is_topk_encode(S: int, C: int, U: int) -> None:
    case = inputs(5, 6, 30, S, C, U)
    case["scale"] = torch.ones_like(case["scale"])
    values, indices = run(case, 4, U)
    pre = case["r0"].double() @ case["W_enc"].double().T + case["b_enc"].double()
    assert torch.equal(indices, pre.topk(4).indices)
    ours = gradients(case, rows(5, 4, seed=7), values, indices, U)
    assert ours["z_values"].shape == (5, S) and not ours["z_values"].any()
    assert ours["V"].shape == (30, C) and not ours["V"].any()


def test_strided_inputs_and_no_tokens() -> None:
    case = inputs(4, 6, 10, 5, 4, 9)
    values, indices = run(case, 5, 9)
    plain = gradients(case, rows(4, 5, seed=7), values, indices, 9)
    views = {name: strided(value) for name, value in case.items()}
    with Guarded():
        outputs = run(views, 5, 9)
        ours = gradients(views, strided(rows(4, 5, seed=7)), *outputs, 9)
    assert_same_bits((values, indices, *plain.values()), (*outputs, *ours.values()))
    empty = {name: value[:0] if name in ("r0", "z_values", "z_indices", "scale") else value
             for name, value in case.items()}  # fmt: skip
    values, indices = run(empty, 5, 9)
    assert values.shape == indices.shape == (0, 5)
    assert not gradients(empty, values, values, indices, 9)["V"].any()


def test_ids_out_of_range_are_refused() -> None:
    if DEVICE != "cpu":
        pytest.skip("ids are read on the CPU only")
    case = inputs(4, 6, 20, 5, 4, 9)
    case["z_indices"][1, 2] = 9
    with pytest.raises(ValueError, match="z_indices: expected ids in 0..8"):
        run(case, 5, 9)
