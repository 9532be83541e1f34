"""The sections of `gpu.py` that say what the machine is, and whether every op is right on it."""

import platform
from dataclasses import replace
from functools import partial

import torch
import triton
from gpu_clock import DEVICE, GPU, Results
from gpu_kernels import MIB, Sizes, encoder, normal, spread_ids, torch_precision

from sparseclt import ops
from sparseclt.ops import selftest


def machine(out: Results, x: Sizes) -> None:
    """Versions, and the ceilings: matrix products and a copy."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    out.add("versions", **versions)
    if GPU:
        p = torch.cuda.get_device_properties(0)
        capability = f"{p.major}.{p.minor}"
        out.add("device", gpu=p.name, capability=capability, SMs=p.multi_processor_count, GiB=p.total_memory / 2**30)
    n = 8192 if GPU else 16
    for dtype, precision in ((torch.bfloat16, "highest"), (torch.float32, "highest"), (torch.float32, "high")):
        with torch_precision(precision):
            a, b = normal(n, n, dtype=dtype), normal(n, n, dtype=dtype)
            kind = "bf16" if dtype == torch.bfloat16 else "TF32" if precision == "high" else "strict fp32"
            out.time(f"torch matmul {n} {kind}", partial(torch.mm, a, b), flops=2.0 * n**3)
    source = torch.ones((4096 if GPU else 1) * MIB // 4, device=DEVICE)
    target = torch.empty_like(source)
    out.time(f"copy of {source.numel() * 4 // MIB} MiB", lambda: target.copy_(source), bytes_=2.0 * source.numel() * 4)


def correct(out: Results, x: Sizes) -> None:
    """Every op in every dtype against float64: outputs and gradients (`sparseclt selftest`)."""
    sizes = {} if GPU else {"N": 4, "D": 8, "F": 20, "K": 2, "C": 3, "U": 50, "S": 4}
    cases = selftest.cases(**sizes)
    if not GPU:
        cases = [case for case in cases if case.op in ("topk_encode", "sparse_decode")][:1]
    for case in cases:
        for dtype in (torch.float32, torch.bfloat16, torch.float16) if GPU else (torch.float32,):
            with out.guarded(f"{case.name} {dtype}"):
                row = selftest.check(case, dtype, "triton", DEVICE)
                wrong = {what: e for what, e in row.found.items() if e > row.allowed(what)}
                worst = max(row.found.values())
                failed = f"error of {', '.join(wrong)}" if wrong else None
                out.add(f"{case.name} {str(dtype).removeprefix('torch.')}", error=worst, failed=failed)


def large(out: Results, x: Sizes) -> None:
    """More elements than int32 counts: 16 rows against torch."""
    N, F, D, rows = (40_000, 65_536, 64, 1 << 20) if GPU else (16, 64, 16, 64)
    with out.guarded("topk_encode, N F > 2^31"):
        e = replace(x, N=N, F=F, D=D)
        inputs = encoder(e, torch.float32)
        values, _ = ops.topk_encode(*inputs, x.K, backend="triton", scratch_bytes=(12 << 30) if GPU else None)
        few = torch.arange(N - 8, N, device=DEVICE)
        true = (inputs[0][few].double() @ inputs[1].double().T + inputs[2].double()).relu().topk(x.K).values
        error = float((values[few].double() - true).abs().max())
        out.add("topk_encode, N F > 2^31", error=error, failed="wrong values" if error > 1e-4 else None)
        del inputs, values
    with out.guarded("sparse_decode, decoder of > 2^31 elements"):
        W = normal(rows, x.D, dtype=x.dtype)
        indices = (rows - 1 - spread_ids(16, x.K, rows)).contiguous()
        weights = torch.rand(16, x.K, device=DEVICE).to(x.dtype).requires_grad_()
        result = ops.sparse_decode(weights, indices, W, backend="triton")
        true = (weights.detach().double()[:, :, None] * W[indices].double()).sum(1)
        (d_values,) = torch.autograd.grad(result, weights, result.detach())
        true_d = (W[indices].double() * result.detach().double()[:, None]).sum(2)
        error = max(selftest.distance(result, true), selftest.distance(d_values, true_d))
        name = "sparse_decode, decoder of > 2^31 elements"
        out.add(name, error=error, failed="wrong values" if error > 2e-2 else None)


SECTIONS = (machine, correct, large)
