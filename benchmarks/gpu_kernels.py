"""The sections of `gpu.py` that measure ops and their kernels one by one, beside what plain torch does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from gpu_clock import DEVICE, GPU, Results, host_ms, ms, peak_mib
from torch import Tensor
from torch.nn import functional

from csrc_triton import place, scores, select, transpose
from csrc_triton.rows import row_dots, transposed_gather_sum
from sparseclt import ops

MIB = 1 << 20


@dataclass(frozen=True)
class Sizes:
    """`upstream`: how many modules are upstream of a reader; `targets`: T of a decoder."""

    N: int = 8192
    D: int = 2304
    F: int = 65_536
    K: int = 64
    C: int = 64
    upstream: tuple[int, ...] = (5, 25)
    targets: tuple[int, ...] = (1, 12, 26)
    dtype: torch.dtype = torch.bfloat16


FULL = Sizes()
DRY = Sizes(4, 16, 64, 2, 2, (1,), (1,))


def normal(*shape: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype).mul_(size)


def spread_ids(N: int, K: int, F: int, modules: int = 1) -> Tensor:
    """[N, modules K] int64: K distinct latents of each module, side by side."""
    stretch = F // K
    places = torch.arange(modules * K, device=DEVICE)
    first = places // K * F + places % K * stretch
    return first + torch.randint(stretch, (N, modules * K), device=DEVICE)


def encoder(x: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        normal(x.N, x.D, dtype=dtype),
        normal(x.F, x.D, dtype=dtype, size=x.D**-0.5),
        normal(x.F, dtype=dtype, size=0.02),
    )


@contextmanager
def torch_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def topk(out: Results, x: Sizes) -> None:
    """topk_encode in halves: against torch, by size of scratch, part by part, and other tiles."""
    a, W, b = encoder(x, x.dtype)
    flops = 2.0 * x.N * x.F * x.D

    def dense() -> tuple[Tensor, Tensor]:
        values, indices = functional.linear(a, W, b).topk(x.K)
        return values.relu_(), indices

    def ours(scratch: int | None = None) -> tuple[Tensor, Tensor]:
        return ops.topk_encode(a, W, b, x.K, backend="triton", scratch_bytes=scratch)

    out.time("torch addmm", lambda: functional.linear(a, W, b), flops=flops)
    out.time("torch addmm + topk", dense, flops=flops, MiB=peak_mib(dense))
    out.time("ours, default scratch", ours, flops=flops, MiB=peak_mib(ours), host_ms=host_ms(ours))
    for scratch in (64, 256, 1024, 3072) if GPU else (1,):
        out.time(f"ours, scratch {scratch} MiB", partial(ours, scratch * MIB), flops=flops)
    _parts(out, x, a, W, b)
    with out.guarded("backward"):
        leaves = [t.detach().clone().requires_grad_() for t in (a, W, b)]
        values, _ = ops.topk_encode(leaves[0], leaves[1], leaves[2], x.K, backend="triton")
        grad = torch.ones_like(values)
        out.time("ours, backward", lambda: torch.autograd.grad(values, leaves, grad, retain_graph=True))


def _parts(out: Results, x: Sizes, a: Tensor, W: Tensor, b: Tensor) -> None:
    """The product, the two selections and the ordering, apart, on a block of tokens; then other tiles."""
    n = min(x.N, 2048)
    group = select.group_size(x.F, x.K)
    dense = torch.empty(n, x.F, device=DEVICE)
    maxima = torch.empty(n, x.F // group, dtype=torch.int32, device=DEVICE) if group > 1 else None
    winners = torch.empty(n, x.K, dtype=torch.int32, device=DEVICE)
    ids, values = torch.empty_like(winners), torch.empty(n, x.K, device=DEVICE)
    out_ids, out_values = ids.long(), values.to(x.dtype)
    product = partial(scores.encoder_scores, a[:n], W, b, None, dense, maxima, group)
    out.time(f"product of {n} tokens", product, flops=2.0 * n * x.F * x.D)
    choose = partial(select.select, dense, maxima, group, x.K, winners, ids, values)
    out.time(f"both selections of {n} tokens", choose, bytes_=4.0 * n * (x.F / group + x.K * group))
    out.time(f"order of {n} tokens", partial(place.place, values, ids, out_values, out_ids, relu=True))
    for config in _other_tiles() if GPU else _other_tiles()[:1]:
        with patch.object(scores, "HALF", config):
            name = f"product, {config.rows} x {config.columns} x {config.depth}"
            out.time(
                f"{name}, {config.num_warps} warps, {config.num_stages} stages", product, flops=2.0 * n * x.F * x.D
            )


def _other_tiles() -> list[scores.TileConfig]:
    tile = partial(replace, scores.HALF)
    return [
        tile(num_stages=4),
        tile(columns=256, num_warps=8, num_stages=3),
        tile(columns=256, num_warps=8, num_stages=4),
        tile(rows=256, columns=128, num_stages=3),
        tile(rows=64, columns=256, num_warps=4, num_stages=4),
        tile(num_warps=4, num_stages=3),
    ]


def fp32(out: Results, x: Sizes) -> None:
    """Precisions of fp32 products: time, error against float64, and agreement of the selected latents."""
    a, W, b = encoder(x, torch.float32)
    few = slice(0, min(256, x.N))
    true = a[few].double() @ W.double().T + b.double()
    best = true.topk(x.K).indices.sort(1).values
    flops = 2.0 * x.N * x.F * x.D

    def row(name: str, encode: Callable[[], tuple[Tensor, Tensor]]) -> None:
        with out.guarded(name):
            values, indices = encode()
            error = float((values[few].double() - true.gather(1, indices[few])).abs().max())
            agreement = float((indices[few].sort(1).values == best).float().mean())
            out.time(name, encode, flops=flops, error=error, agreement=agreement)

    def dense() -> tuple[Tensor, Tensor]:
        return functional.linear(a, W, b).topk(x.K)

    for precision, label in (("highest", "strict fp32"), ("high", "TF32")):
        with torch_precision(precision):
            row(f"torch addmm + topk, {label}", dense)
    for name in PRECISIONS if GPU else PRECISIONS[:1]:
        with patch.object(scores, "fp32_precision", lambda name=name: name):
            row(f"ours, {name}", lambda: ops.topk_encode(a, W, b, x.K, backend="triton"))


PRECISIONS = tuple(scores.FLOAT32)


def connected(out: Results, x: Sizes) -> None:
    """connected_encode, forward and backward, beside its matrix product."""
    r0, W, b = encoder(x, x.dtype)
    out.time("torch addmm", lambda: functional.linear(r0, W, b), flops=2.0 * x.N * x.F * x.D)
    for modules in x.upstream:
        name = f"S {modules * x.K}, U {modules} F"
        with out.guarded(name):
            U = modules * x.F
            z_indices = spread_ids(x.N, x.K, x.F, modules)
            z = torch.rand(z_indices.shape, device=DEVICE).to(x.dtype).requires_grad_()
            V = normal(x.F, x.C, dtype=x.dtype, size=x.C**-0.5).requires_grad_()
            connections = ops.Connections(spread_ids(x.F, x.C, U), U)
            scale = torch.ones(x.N, device=DEVICE, dtype=x.dtype)
            run = partial(
                ops.connected_encode, r0, W, b, z, z_indices, V, connections, scale, x.K, backend="triton"
            )  # fmt: skip
            out.time(f"forward, {name}", run, host_ms=host_ms(run), MiB=peak_mib(run))
            values, _ = run()
            grad = torch.ones_like(values)
            leaves = {"dz": (z,), "dV": (V,), "dz, dV": (z, V)}
            for what, wanted in leaves.items() if GPU else [("dz, dV", (z, V))]:
                back = partial(torch.autograd.grad, values, wanted, grad, retain_graph=True)
                out.time(f"backward by {what}, {name}", back, host_ms=host_ms(back))


def decode(out: Results, x: Sizes) -> None:
    """Products with gathered rows: bytes that they must move at least, per second."""
    size = x.dtype.itemsize
    for T in x.targets:
        with out.guarded(f"decode, T {T}"):
            W = normal(x.F, T * x.D, dtype=x.dtype)
            indices = spread_ids(x.N, x.K, x.F)
            values = torch.rand(indices.shape, device=DEVICE).to(x.dtype)
            used = float(x.N * x.K * T * x.D * size)
            decode = partial(ops.sparse_decode, values, indices, W.view(x.F, T, x.D), backend="triton")
            out.time(f"sparse_decode forward, T {T}", decode, bytes_=used)
            grad = decode().flatten(1)
            out.time(f"d_values, T {T}", partial(row_dots, grad, indices, W), bytes_=used)
            order, starts = transpose.transpose(indices, x.F)
            lists = partial(transposed_gather_sum, values, order, starts, grad)
            out.time(f"dW, T {T}", lists, bytes_=used + float(x.F * T * x.D * size))
            bags = partial(functional.embedding_bag, indices, W, per_sample_weights=values, mode="sum")
            out.time(f"torch embedding_bag, T {T}", bags, bytes_=used)
            if T < 26:
                out.time(f"torch scatter + matmul, T {T}", partial(_dense_decode, values, indices, W))
    with out.guarded("virtual_weights"):
        U = x.upstream[0] * x.F
        W_enc, E = normal(x.F, x.D, dtype=x.dtype), normal(U, x.D, dtype=x.dtype)
        kept = ops.Connections(spread_ids(x.F, x.C, U), U)
        run = partial(ops.virtual_weights, W_enc, E, kept, backend="triton")
        out.time("virtual_weights", run, bytes_=float(x.F * x.C * x.D * size))
    out.time("sort by latent", partial(transpose.transpose, spread_ids(x.N, x.K, x.F), x.F))


def _dense_decode(values: Tensor, indices: Tensor, W: Tensor) -> Tensor:
    return values.new_zeros(len(values), len(W)).scatter_(1, indices, values) @ W


def connections(out: Results, x: Sizes) -> None:
    """select_connections for one reader with all modules upstream."""
    U = x.upstream[-1] * x.F
    W, E = normal(x.F, x.D, dtype=x.dtype), normal(U, x.D, dtype=x.dtype)
    importance = torch.rand(U, device=DEVICE).to(x.dtype)
    select_all = partial(ops.select_connections, W, E, importance, x.C, backend="triton")
    out.time(f"U {x.upstream[-1]} F", select_all, flops=2.0 * x.F * U * x.D, MiB=peak_mib(select_all))
    few = W[: min(x.F, 512)]
    dense = lambda: ((few @ E.T).abs_().mul_(importance)).topk(x.C)  # noqa: E731
    taken = ms(dense)
    whole = None if taken is None else taken * x.F / len(few)
    out.add("torch matmul + topk, from 512 of F rows", ms=whole)


SECTIONS = (topk, fp32, connected, decode, connections)
