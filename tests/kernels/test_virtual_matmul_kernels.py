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

from csrc_triton import SCRATCH_BYTES, add_upstream
from csrc_triton import virtual_matmul as kernels
from csrc_triton.transpose import transpose
from sparseclt.ops import virtual_matmul


def case(N=5, S=6, F=40, C=4, U=25, dtype=torch.float32, index_dtype=torch.int64):
    return {
        "z_values": rows(N, S, dtype=dtype, seed=1),
        "z_indices": ids(N, S, count=U, dtype=index_dtype, seed=2),
        "V": rows(F, C, dtype=dtype, seed=3),
        "connections": distinct_ids(F, C, count=U, seed=4),
    }


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(kernels, "PART", 3)
    monkeypatch.setattr(add_upstream, "PAIRS", add_upstream.Walk(block=8))
    monkeypatch.setattr(add_upstream, "SLOTS", add_upstream.Walk(block=4))


def ours(inputs, cotangent, upstream, scratch_bytes=SCRATCH_BYTES):
    with Guarded():
        csc = transpose(inputs["connections"], upstream)
        arguments = *inputs.values(), *csc, upstream, scratch_bytes
        out = kernels.forward(*arguments)
        dz, dV = kernels.backward(cotangent, *arguments, (True, True))
    return {"out0": out, "z_values": dz, "V": dV}


def assert_right(inputs, upstream, **options):
    truth, peer = truth_and_peer(virtual_matmul, inputs, upstream=upstream)
    got = ours(inputs, truth["cotangent"], upstream, **options)
    for name, value in got.items():
        assert_accurate(value, peer[name], truth[name], name)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(dtype):
    assert_right(case(dtype=dtype, index_dtype=torch.int32), 25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_halves_in_chunks_of_tokens(dtype):
    assert_right(case(dtype=dtype), 25, scratch_bytes=4 * 40 * 2)


def test_a_latent_that_everything_reads_and_every_token_has():
    inputs = case(N=7, F=150, C=3, U=9)
    inputs["z_indices"][:, 0] = 8
    inputs["connections"][inputs["connections"] == 8] = -1
    inputs["connections"][:, 1] = 8
    assert_right(inputs, 9)


def test_duplicate_latents_of_a_token_add_up():
    inputs = case(N=2)
    inputs["z_indices"][0] = 3
    inputs["connections"][:, 0] = torch.where((inputs["connections"] == 3).any(1), inputs["connections"][:, 0], 3)
    assert_right(inputs, 25)


@pytest.mark.parametrize(
    "sizes",
    [dict(N=0), dict(S=0), dict(F=0), dict(C=0), dict(S=1, C=1, F=1, U=1, N=1), dict(U=0), dict(C=1, U=1)],
    ids=str,
)
def test_edge_sizes(sizes):
    U = sizes.get("U", 25)
    inputs = case(**sizes)
    if U == 0:
        inputs["connections"] = torch.full((40, 4), -1, device=DEVICE)
    assert_right(inputs, U)


def test_any_strides():
    inputs = case()
    moved = {name: strided(value) for name, value in inputs.items()}
    cotangent = rows(5, 40, seed=9)
    plain, views = ours(inputs, cotangent, 25), ours(moved, strided(cotangent), 25)
    assert_same_bits(tuple(plain.values()), tuple(views.values()))


def test_adds_to_what_is_there():
    inputs = case()
    z = inputs["z_values"], inputs["z_indices"]
    csc = transpose(inputs["connections"], 25)
    before = rows(5, 40, seed=7)
    truth, _ = truth_and_peer(virtual_matmul, inputs, upstream=25)
    for pre in (before.clone(), strided(before)):
        with Guarded():
            lists = add_upstream.out_lists(inputs["V"], *csc)
            add_upstream.add_upstream(pre, *z, lists, 25)
        expected = truth["out0"] + before.double()
        assert_accurate(pre, expected.float(), expected)


def test_runs_are_bitwise_equal_whatever_the_order_of_tokens():
    inputs = case()
    cotangent = rows(5, 40, seed=9)
    first, *others = (tuple(ours(inputs, cotangent, 25).values()) for _ in range(3))
    assert_same_bits(first, *others)
    shuffle = torch.randperm(5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    moved = inputs | {name: inputs[name][shuffle] for name in ("z_values", "z_indices")}
    again = ours(moved, cotangent[shuffle], 25)
    assert_same_bits((first[0][shuffle], first[1][shuffle]), (again["out0"], again["z_values"]))


def test_nan_reaches_the_latents_connected_to_it_and_no_others():
    inputs = case(S=2)
    inputs["z_values"][1, 0], inputs["z_indices"][1] = torch.nan, torch.tensor([4, 5])
    inputs["z_values"][2, 0], inputs["z_indices"][2, 0] = torch.nan, -1
    got = ours(inputs, rows(5, 40, seed=9), 25)
    reached = (inputs["connections"] == 4).any(1)
    assert torch.equal(got["out0"][1].isnan(), reached) and not got["out0"][2].isnan().any()
    assert torch.equal(got["V"].isnan(), inputs["connections"] == 4)
