"""Bytes that kernels request, counted in the interpreter, against the formulas of sparseclt/costs.py."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

if torch.cuda.is_available():
    pytest.skip("bytes are counted in the interpreter", allow_module_level=True)

_spec = importlib.util.spec_from_file_location("traffic", Path(__file__).parents[2] / "benchmarks" / "traffic.py")
traffic = importlib.util.module_from_spec(_spec)
sys.modules["traffic"] = traffic
_spec.loader.exec_module(traffic)


@triton.jit
def copy_kernel(out, x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n), mask=i < n)


def test_the_counter_counts_lanes_that_are_not_masked():
    x = torch.randn(1000)
    with traffic.counted() as counter:
        copy_kernel[4,](torch.empty_like(x), x, 1000, BLOCK=256)
    assert (counter.loaded, counter.stored) == (4000, 4000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_ask_for_little_more_than_they_use(dtype):
    ratios = traffic.ratios(dtype)
    ours = {n for n in traffic.kernel_costs(traffic.Sizes(), 1.0) if n.startswith(("sparse_decode", "virtual_"))}
    assert ratios.keys() == ours
    for name, ratio in ratios.items():
        # To find the slot of a pair the forward pass asks for a few numbers more, which stay in L1.
        most = 1.6 if name == "virtual_matmul forward" else 1.3
        assert 0.99 <= ratio <= most, f"{name}: {ratio:.3f}"


def test_times_of_an_op():
    cost = traffic.Cost(flops=67e12, used=6.7e12, once=3.35e12)
    assert traffic.seconds(cost, traffic.H100, traffic.H100.fp32) == (1.0, 2.0)
