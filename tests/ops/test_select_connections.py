import pytest
import torch
from op_helpers import WIDE, LargestAllocation, rows

from sparseclt.ops import select_connections

SHAPES = {  # H (0: no head axis), F, D, U, C
    "odd": (0, 77, 123, 300, 9),
    "heads": (3, 41, 16, 33, 5),
    "one head": (1, 41, 16, 33, 5),
    "C=1": (0, 10, 16, 7, 1),
    "C=U": (0, 10, 16, 7, 7),
    "no latents": (0, 0, 16, 7, 2),
}


def inputs(H, F, D, U, C):
    W_enc = rows(H, F, D, seed=1) if H else rows(F, D, seed=1)
    return {"W_enc": W_enc, "E": rows(U, D, seed=2), "importance": rows(U, seed=3).abs(), "C": C}


@pytest.mark.parametrize("scratch_bytes", [1, 7000, 1 << 22])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_both_backends_equal_the_formula_whatever_the_chunk(shape, scratch_bytes):
    case = inputs(*shape)
    weights = (case["W_enc"] @ case["E"].T).view(max(shape[0], 1), shape[1], shape[3]).square().sum(0).sqrt()
    expected = (case["importance"] * weights).topk(case["C"]).indices
    for backend in ("reference", *WIDE):
        connections = select_connections(**case, backend=backend, scratch_bytes=scratch_bytes)
        assert connections.dtype == torch.int64 and torch.equal(connections, expected)


@pytest.mark.parametrize("scratch_bytes", [1, 7000, 1 << 22])
@pytest.mark.parametrize("backend", ["reference", *WIDE])
def test_an_importance_for_each_pair(backend, scratch_bytes):
    case = inputs(*SHAPES["odd"])
    case["importance"] = rows(77, 300, seed=4).abs()
    expected = (case["importance"] * (case["W_enc"] @ case["E"].T).abs()).topk(9).indices
    assert torch.equal(select_connections(**case, backend=backend, scratch_bytes=scratch_bytes), expected)


def test_non_contiguous_inputs_give_the_same():
    case = inputs(*SHAPES["heads"])
    strided = case | {"W_enc": case["W_enc"].mT.contiguous().mT, "E": case["E"].T.contiguous().T}
    assert torch.equal(select_connections(**case), select_connections(**strided))


def test_a_negative_virtual_weight_counts_by_its_size():
    """An importance of signed contributions would cancel."""
    E = torch.tensor([[-3.0], [1.0], [2.0]])
    assert select_connections(torch.ones(1, 1), E, torch.ones(3), 2).tolist() == [[0, 2]]


def test_inputs_that_require_grad_are_accepted():
    case = inputs(*SHAPES["odd"])
    case["W_enc"].requires_grad_()
    assert not select_connections(**case).requires_grad


def test_latents_by_upstream_never_exists():
    F, D, U = 600, 8, 5000
    with LargestAllocation() as largest:
        select_connections(**inputs(2, F, D, U, 2), backend="torch", scratch_bytes=200_000)
    assert largest.elements <= U * D < F * U / 50


def test_repeatable():
    case = inputs(3, 200, 16, 300, 20)
    assert all(torch.equal(select_connections(**case), select_connections(**case)) for _ in range(2))


BAD = {
    "C > U": ({"C": 8}, ValueError, r"C: expected from 1 to 7 \(there are 7 upstream latents\), got 8"),
    "C = 0": ({"C": 0}, ValueError, r"C: expected from 1 to 7"),
    "another U": ({"importance": rows(6)}, ValueError, r"importance: expected shape \[U\] \(U=7 as in E\), got \(6,\)"),
    "another D": ({"E": rows(7, 3)}, ValueError, r"E: expected shape \[U, D\] \(D=4 as in W_enc\), got \(7, 3\)"),
    "one axis": ({"W_enc": rows(5)}, ValueError, r"W_enc: expected shape \[F, D\] or \[H, F, D\], got \(5,\)"),
    "another dtype": ({"importance": rows(7).float()}, TypeError, r"importance: expected torch.float64"),
    "unknown backend": ({"backend": "x"}, ValueError, r"backend of select_connections: .*'torch'"),
}


@pytest.mark.parametrize(("change", "error", "match"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, error, match):
    with pytest.raises(error, match=match):
        select_connections(**inputs(0, 5, 4, 7, 3) | change)
