"""Every op, dtype and backend against float64: at most twice the error of plain torch in the same dtype."""

import pytest
import torch
from op_helpers import BACKENDS, COMPILED, DEVICE

from sparseclt.ops import selftest

SMALL = {"N": 12, "D": 24, "F": 90, "U": 100}
CASES = {case.name: case for case in selftest.cases()}
SMALL_CASES = {case.name: case for case in selftest.cases(**SMALL)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", selftest.TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_error_is_at_most_twice_plain_torchs(name, backend, dtype):
    if not selftest.runnable(backend, dtype, DEVICE):
        pytest.skip(f"{backend} does not take {dtype}")
    case = (SMALL_CASES if backend in COMPILED and DEVICE == "cpu" else CASES)[name]
    row = selftest.check(case, dtype, backend, DEVICE)
    assert row.passed, selftest.table([row])
    assert len(row.found) > 1 or name == "select_connections"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.op.endswith(("encode", "connections"))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision_is_exact_whatever_the_chunk(name, dtype):
    for scratch_bytes in (1, 3000, 20_000):
        row = selftest.check(SMALL_CASES[name], dtype, "torch", DEVICE, scratch_bytes=scratch_bytes)
        assert row.passed, selftest.table([row])


def test_sums_in_half_precision_are_accumulated_in_fp32():
    """1000 ones on top of 4096: bf16 sums would stay at 4096."""
    from sparseclt.ops import sparse_decode, topk_encode

    ones = torch.ones(1, 1001, dtype=torch.bfloat16, device=DEVICE)
    weights = ones.clone()
    weights[0, 0] = 4096
    decoded = sparse_decode(ones, torch.arange(1001, device=DEVICE)[None], weights.T.contiguous())
    encoded, _ = topk_encode(ones, weights, None, 1)
    assert decoded.item() == encoded.item() == 5088  # 5096 has no bf16: between 5088 and 5120
