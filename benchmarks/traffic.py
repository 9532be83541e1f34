"""The work and the memory traffic of each op by formula, and the bytes that its kernels request; needs no GPU.

    python benchmarks/traffic.py            the tables of docs/kernels.md
    python benchmarks/traffic.py --write    puts them there

- *flops*, *bytes used*, *bytes once*: by the formulas of `sparseclt/costs.py`. Here, bytes used counts the operands
  of a matrix product once per tile of 128 x 128, and the scores of a tile as written once.
- *at least*: the larger of flops / peak and bytes once / bandwidth. *without cache*: the larger of flops / peak and
  bytes used / bandwidth. A real run lies between the two if the kernel is any good, or above.
- *asked / used*: bytes that the kernels request in Triton's interpreter, at a small size with the true row lengths,
  over the formula at that size. What torch does around the kernels (sorting ids, filling) is not in either.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from csrc_triton import (  # noqa: E402
    SCRATCH_BYTES,
    connected_encode,
    select_connections,
    sparse_decode,
    topk_encode,
    virtual_matmul,
    virtual_weights,
)
from csrc_triton.transpose import transpose  # noqa: E402
from sparseclt import costs  # noqa: E402
from sparseclt.costs import FLOAT, Cost, Widths  # noqa: E402

PAGE = ROOT / "docs" / "kernels.md"
TILE = 128  # rows and columns of a product that share their operands


@dataclass(frozen=True)
class Gpu:
    """Peak rates from the vendor's data sheet: bytes a second, and operations a second without sparsity."""

    name: str
    bandwidth: float
    fp32: float  # outside tensor cores: what gathers multiply with
    bf16: float


H100 = Gpu("H100 SXM", 3.35e12, 67e12, 989e12)
A100 = Gpu("A100 80GB", 2.04e12, 19.5e12, 312e12)


@dataclass(frozen=True)
class Sizes:
    """`e`: bytes of a number."""

    N: int = 4096
    F: int = 16384
    D: int = 768
    K: int = 32
    C: int = 32
    U: int = 16384
    S: int = 32
    e: int = 2


# Ops with a matrix product, which runs on tensor cores: its rows and columns.
PRODUCTS = {
    "topk_encode forward": ("N", "F"),
    "connected_encode forward": ("N", "F"),
    "select_connections": ("F", "U"),
}


def kernel_costs(x: Sizes, walks: float) -> dict[str, Cost]:
    """By op and pass. `walks`: see `costs.mean_walks`."""
    w = Widths(x.e)
    encoder = {"N": x.N, "D": x.D, "F": x.F, "K": x.K}
    upstream = {"F": x.F, "C": x.C, "U": x.U}
    connected = costs.connected_encode(w, **encoder, C=x.C, U=x.U, S=x.S, walks=walks)
    ops = {
        "topk_encode": {"forward": costs.topk_encode(w, **encoder)["forward"]},
        "sparse_decode": costs.sparse_decode(w, **encoder),
        "virtual_weights": costs.virtual_weights(w, **upstream, D=x.D),
        "virtual_matmul": costs.virtual_matmul(w, **upstream, N=x.N, S=x.S, walks=walks),
        "connected_encode": {"forward": connected["forward"]},
    }
    found = {f"{op} {name}": cost for op, passes in ops.items() for name, cost in passes.items()}
    found["select_connections"] = costs.select_connections(w, **upstream, D=x.D)["forward"]
    for name, letters in PRODUCTS.items():
        rows, columns = (getattr(x, letter) for letter in letters)
        found[name] += Cost(used=_tiles(rows, columns, x) - (rows + columns) * x.D * x.e)
    return found


def _tiles(rows: int, columns: int, x: Sizes) -> float:
    """Bytes of a product's operands, once per tile, and of its float32 scores."""
    return (rows * -(-columns // TILE) + columns * -(-rows // TILE)) * x.D * x.e + rows * columns * FLOAT


@dataclass
class Counter:
    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Counts the bytes that interpreted kernels load and store: each lane whose mask is set."""
    counter = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers, mask) -> int:  # type: ignore[no-untyped-def]
        lanes = np.broadcast_to(mask.data, np.shape(pointers.data)).sum()
        return int(lanes) * (pointers.get_element_ty().primitive_bitwidth // 8)

    def counting_load(self, pointers, mask, *rest):  # type: ignore[no-untyped-def]
        counter.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):  # type: ignore[no-untyped-def]
        counter.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = counting_load
    InterpreterBuilder.create_masked_store = counting_store
    try:
        yield counter
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def ids(count: int, *shape: int) -> Tensor:
    """Distinct ids in each row."""
    return torch.stack([torch.randperm(count)[: shape[1]] for _ in range(shape[0])])


def asked(name: str, run: Callable[[], object], x: Sizes, walks: float = 0.0, more: float = 0.0) -> float:
    """Bytes that `run` requests, and `more` that torch moves beside it, over the bytes that the formula uses."""
    with counted() as counter:
        run()
    return (counter.total + more) / kernel_costs(x, walks or costs.mean_walks(x.N, x.F, x.C, x.U, x.S))[name].used


def ratios(dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """asked / used of every op, at small sizes with the row lengths of the model figures."""
    torch.manual_seed(0)
    e = dtype.itemsize
    return _decode_ratios(dtype, e) | _virtual_weights_ratios(dtype, e) | _virtual_matmul_ratios(dtype, e)


def _decode_ratios(dtype: torch.dtype, e: int) -> dict[str, float]:
    x = Sizes(N=5, F=64, K=32, e=e)
    values, indices = torch.rand(x.N, x.K, dtype=dtype), ids(x.F, x.N, x.K)
    W, grad = torch.randn(x.F, x.D, dtype=dtype), torch.randn(x.N, x.D, dtype=dtype)
    arguments = values, indices, W
    return {
        "sparse_decode forward": asked("sparse_decode forward", lambda: sparse_decode.forward(*arguments), x),
        "sparse_decode d_values": asked(
            "sparse_decode d_values", lambda: sparse_decode.backward(grad, *arguments, (True, False)), x
        ),
        "sparse_decode dW": asked(
            "sparse_decode dW", lambda: sparse_decode.backward(grad, *arguments, (False, True)), x
        ),
    }


def _virtual_weights_ratios(dtype: torch.dtype, e: int) -> dict[str, float]:
    x = Sizes(F=6, U=64, C=32, e=e)
    W, E = torch.randn(x.F, x.D, dtype=dtype), torch.randn(x.U, x.D, dtype=dtype)
    arguments = W, E, ids(x.U, x.F, x.C)
    csc = transpose(arguments[2], x.U)
    grad = torch.randn(x.F, x.C, dtype=dtype)
    return {
        "virtual_weights forward": asked("virtual_weights forward", lambda: virtual_weights.forward(*arguments), x),
        "virtual_weights dW": asked(
            "virtual_weights dW", lambda: virtual_weights.backward(grad, *arguments, *csc, (True, False)), x
        ),
        "virtual_weights dE": asked(
            "virtual_weights dE", lambda: virtual_weights.backward(grad, *arguments, *csc, (False, True)), x
        ),
    }


def _virtual_matmul_ratios(dtype: torch.dtype, e: int) -> dict[str, float]:
    """Two tokens through all latents: the row of pre-activations is what costs."""
    x = Sizes(N=2, e=e)
    z_values, z_indices = torch.rand(x.N, x.S, dtype=dtype), ids(x.U, x.N, x.S)
    V, connections = torch.randn(x.F, x.C, dtype=dtype), torch.randint(0, x.U, (x.F, x.C))
    csc, grad = transpose(connections, x.U), torch.randn(x.N, x.F, dtype=dtype)
    walks = float(torch.bincount(connections.flatten(), minlength=x.U)[z_indices].sum())
    arguments = z_values, z_indices, V, connections, *csc, x.U, SCRATCH_BYTES
    few = Sizes(N=16, F=64, U=64, C=8, S=8, e=e)  # dV walks tokens, all latents would take minutes
    few_z = torch.rand(few.N, few.S, dtype=dtype), ids(few.U, few.N, few.S), V[: few.F, : few.C]
    few_connections = ids(few.U, few.F, few.C)
    few_arguments = *few_z, few_connections, *transpose(few_connections, few.U), few.U, SCRATCH_BYTES
    few_walks = torch.bincount(few_connections.flatten(), minlength=few.U)
    filled = x.N * x.F * (FLOAT if e == FLOAT else 2 * FLOAT + e)  # and converted, by torch
    return {
        "virtual_matmul forward": asked(
            "virtual_matmul forward", lambda: virtual_matmul.forward(*arguments), x, walks, filled
        ),
        "virtual_matmul dz": asked(
            "virtual_matmul dz", lambda: virtual_matmul.backward(grad, *arguments, (True, False)), x, walks
        ),
        "virtual_matmul dV": asked(
            "virtual_matmul dV",
            lambda: virtual_matmul.backward(grad[:1, : few.F].expand(few.N, -1), *few_arguments, (False, True)),
            few,
            float(few_walks[few_z[1]].sum()),
        ),
    }


def encode_ratios(dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """asked / used of the ops with a matrix product; what is above 1 is selection."""
    torch.manual_seed(0)
    x = Sizes(N=128, F=2048, D=128, K=8, C=4, U=256, S=2, e=dtype.itemsize)
    r0, W, b = (torch.randn(*shape, dtype=dtype) for shape in [(x.N, x.D), (x.F, x.D), (x.F,)])
    z = torch.rand(x.N, x.S, dtype=dtype), ids(x.U, x.N, x.S)
    V, connections = torch.randn(x.F, x.C, dtype=dtype), ids(x.U, x.F, x.C)
    csc, E = transpose(connections, x.U), torch.randn(x.U, x.D, dtype=dtype)
    runs = {
        "topk_encode forward": lambda: topk_encode.forward(r0, W, b, x.K, "topk", SCRATCH_BYTES),
        "connected_encode forward": lambda: connected_encode.forward(
            r0, W, b, *z, V, connections, *csc, x.U, torch.ones(x.N, dtype=dtype), x.K, SCRATCH_BYTES
        ),
        "select_connections": lambda: select_connections.forward(
            W[None], E, torch.ones(x.U, dtype=dtype), x.C, SCRATCH_BYTES
        ),
    }
    return {name: asked(name, run, x) for name, run in runs.items()}


def seconds(cost: Cost, gpu: Gpu, flops_per_second: float) -> tuple[float, float]:
    """At least, and without cache."""
    arithmetic = cost.flops / flops_per_second
    return max(arithmetic, cost.once / gpu.bandwidth), max(arithmetic, cost.used / gpu.bandwidth)


def table(measured: dict[str, float]) -> str:
    x = Sizes()
    lines = [
        "| op and pass | flops | bytes used | bytes once | H100 at least | H100 without cache | A100 at least |"
        " A100 without cache | asked / used |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cost in kernel_costs(x, costs.mean_walks(x.N, x.F, x.C, x.U, x.S)).items():
        rates = {gpu: gpu.bf16 if name in PRODUCTS else gpu.fp32 for gpu in (H100, A100)}
        times = [f"{1e6 * t:.0f} us" for gpu, rate in rates.items() for t in seconds(cost, gpu, rate)]
        numbers = [f"{n:.2g}" for n in (cost.flops, cost.used, cost.once)]
        ratio = f"{measured[name]:.2f}" if name in measured else "-"
        lines.append(f"| {' | '.join([name, *numbers, *times, ratio])} |")
    return "\n".join(lines)


def write_page(text: str) -> None:
    begin, end = "<!-- table: begin -->", "<!-- table: end -->"
    page = PAGE.read_text()
    PAGE.write_text(f"{page[: page.index(begin)]}{begin}\n\n{text}\n\n{page[page.index(end) :]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"replace the table in {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    text = table(ratios() | encode_ratios())
    print(text)
    if args.write:
        write_page(text)


if __name__ == "__main__":
    main()
