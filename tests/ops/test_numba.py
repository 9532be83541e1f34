"""What is the numba backend's own: threads, tiles, a cache on disk, and an import at first use alone."""

import subprocess
import sys

import pytest
import torch
from op_helpers import DEVICE

from sparseclt import ops
from sparseclt.ops import selftest

pytest.importorskip("numba")
pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="numba runs on the CPU")

SIZES = {"N": 23, "D": 24, "F": 90, "K": 5, "C": 4, "U": 40, "S": 6}
CASES = {case.name: case for case in selftest.cases(**SIZES)}


def outputs_and_gradients(case):
    inputs = selftest.cast(case.inputs, torch.float32, DEVICE)
    result = getattr(ops, case.op)(**inputs, backend="numba")
    results = list(result) if isinstance(result, tuple) else [result]
    outputs = [out for out in results if out.requires_grad]
    return [*results, *(selftest.gradients(outputs, inputs).values() if outputs else ())]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_the_number_of_threads_changes_nothing(monkeypatch, threads, name):
    from sparseclt.ops import _numba_compile

    monkeypatch.setattr(_numba_compile, "WORK_A_THREAD", 1)
    threads(1)
    expected = outputs_and_gradients(CASES[name])
    threads(3)
    for got, one in zip(outputs_and_gradients(CASES[name]), expected, strict=True):
        assert torch.equal(got, one)


def test_an_error_on_another_thread_is_raised(monkeypatch, threads):
    from sparseclt.ops import _numba_compile

    def fail(start, stop):
        assert start == 0, "on the other thread"

    monkeypatch.setattr(_numba_compile, "WORK_A_THREAD", 1)
    threads(2)
    with pytest.raises(AssertionError, match="on the other thread"):
        _numba_compile.run(fail, 2, 10)


@pytest.mark.parametrize("scratch_bytes", [0, 1, 400, 5000, 1 << 22])
@pytest.mark.parametrize(("tokens", "columns"), [(0, 5), (1, 1), (7, 1000), (1000, 7), (3000, 3000)])
def test_tiles_fit_in_the_scratch_beyond_one_token(tokens, columns, scratch_bytes):
    from sparseclt.ops._numba import _tiles

    height, width = _tiles(tokens, columns, 4, scratch_bytes)
    assert 1 <= height <= max(1, tokens) and 1 <= width <= columns
    assert height * width * 4 <= max(scratch_bytes, columns * 4)


@pytest.mark.parametrize("width", [64, 150, 400])
@pytest.mark.parametrize("numbers", ["distinct", "many equal", "few positive", "some NaN"])
@pytest.mark.parametrize("absolute", [False, True])
def test_lists_fed_tile_by_tile_are_the_head_of_a_stable_sort(numbers, width, absolute):
    from sparseclt.ops import _numba_select as select

    N, F, k, generator = 40, 400, 12, torch.Generator().manual_seed(0)
    pre = torch.randn(N, F, generator=generator)
    pre = {"distinct": pre, "many equal": (2 * pre).round(), "few positive": pre - 2}.get(numbers, pre)
    if numbers == "some NaN":
        pre[torch.rand(N, F, generator=generator) < 0.02] = torch.nan
    bias = torch.randn(F, generator=generator).round() / 2
    values, indices, counts = torch.empty(N, k), torch.empty(N, k, dtype=torch.int64), torch.zeros(N, dtype=torch.int64)
    lists = [tensor.numpy() for tensor in (values, indices, counts)]
    for offset in range(0, F, width):
        tile = pre[:, offset : offset + width].contiguous().numpy()
        select.take_encoded(0, N, tile, offset, bias.numpy(), absolute, *lists)
    select.finish(0, N, *lists)
    pre += bias
    score = pre.abs() if absolute else pre.relu()
    order = score.nan_to_num(torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected = (pre if absolute else score).gather(1, order)
    assert torch.equal(values.nan_to_num(99), expected.nan_to_num(99))
    assert torch.equal(indices[values != 0], order[values != 0])


def test_compiled_functions_are_cached_on_disk():
    from sparseclt.ops import _numba_rows, _numba_select

    outputs_and_gradients(CASES["connected_encode"])
    for kernel in (_numba_rows.transpose, _numba_select.take_encoded):
        assert sum(kernel.stats.cache_hits.values()) + sum(kernel.stats.cache_misses.values()) > 0
        assert kernel.stats.cache_path is not None


def test_numba_is_imported_when_first_used():
    code = """if True:
        import sys, torch
        from sparseclt import ops
        assert "numba" not in sys.modules
        x = torch.ones(2, 3)
        ops.topk_encode(x.half(), x.half(), None, 1)
        assert "numba" not in sys.modules
        ops.topk_encode(x, x, None, 1)
        assert "numba" in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("rows", "huge"), [(16, False), (4096, True)])
def test_large_results_ask_for_huge_pages_within_their_bounds(monkeypatch, rows, huge):
    from sparseclt.ops import _huge_pages

    asked = []
    monkeypatch.setattr(_huge_pages, "_advise", lambda: lambda *call: asked.append(call))
    values, indices = torch.rand(8, 3), torch.randint(rows, (8, 3))
    W = torch.randn(rows, 512, requires_grad=True)
    ops.sparse_decode(values, indices, W, backend="numba").sum().backward()
    assert len(asked) == huge
    for start, length, _ in asked:
        assert W.grad is not None
        assert W.grad.data_ptr() <= start and start + length <= W.grad.data_ptr() + W.grad.nbytes
        assert length > 0.99 * W.grad.nbytes
