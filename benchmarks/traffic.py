"""What each op has to move and to compute, and what its kernels ask for: model figures, no GPU needed.

    python benchmarks/traffic.py            the tables of docs/kernels.md
    python benchmarks/traffic.py --write    puts them there

- *flops*, *bytes used*: by formula. Bytes used counts an operand each time the formula uses it: a decoder row
  gathered by two tokens counts twice, the operands of a matrix product count once per tile of 128 x 128, whose scores
  are written once. *bytes once*: every operand and result once, as with an endless cache.
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

PAGE = ROOT / "docs" / "kernels.md"
TILE = 128  # rows and columns of a product that share their operands


@dataclass(frozen=True)
class Gpu:
    """Peak rates from the vendor's data sheet: bytes a second, and operations a second without sparsity."""

    name: str
    bandwidth: float
    fp32: float  # outside tensor cores: what gathers multiply with
    tf32: float
    bf16: float


H100 = Gpu("H100 SXM", 3.35e12, 67e12, 495e12, 989e12)
A100 = Gpu("A100 80GB", 2.04e12, 19.5e12, 156e12, 312e12)


@dataclass(frozen=True)
class Sizes:
    """`e` bytes a number, `i` bytes an id, `p` bytes a position in a transposed order; U upstream, S their slots."""

    N: int = 4096
    F: int = 16384
    D: int = 768
    K: int = 32
    C: int = 32
    U: int = 16384
    S: int = 32
    e: int = 2
    i: int = 8
    p: int = 4

    @property
    def walks(self) -> float:
        """Connections met by all active upstream latents of all tokens, when they are spread evenly."""
        return self.N * self.S * self.C * self.F / self.U


@dataclass(frozen=True)
class Cost:
    flops: float
    used: float
    once: float
    unit: str = "fp32"


def gathers(bags: int, slots: int, rows: int, x: Sizes) -> dict[str, Cost]:
    """The three products of csrc_triton/rows.py, for `bags` with `slots` each and `rows` of D numbers."""
    pairs, D, e = bags * slots, x.D, x.e
    flops, met = 2 * pairs * D, min(pairs, rows)
    slot_bytes, lists = pairs * (x.i + e), pairs * (x.p + e) + 2 * rows * x.p
    return {
        "gather_sum": Cost(flops, slot_bytes + (pairs + bags) * D * e, slot_bytes + (met + bags) * D * e),
        "row_dots": Cost(flops, slot_bytes + (pairs + bags) * D * e, slot_bytes + (met + bags) * D * e),
        "transposed": Cost(flops, lists + (pairs + rows) * D * e, lists + (bags + rows) * D * e),
    }


def _tiles(rows: int, columns: int, x: Sizes) -> float:
    """Bytes of a product's operands, once per tile, and of its float32 scores."""
    return (rows * -(-columns // TILE) + columns * -(-rows // TILE)) * x.D * x.e + rows * columns * 4


def costs(x: Sizes, walks: float) -> dict[str, Cost]:
    """By op and pass. `walks`: see `Sizes.walks`."""
    decode, virtual = gathers(x.N, x.K, x.F, x), gathers(x.F, x.C, x.U, x)
    slots, kept, sums = x.N * x.S, x.F * x.C, x.N * x.F
    z_lists = slots * (x.i + 2 * x.p)  # ids, and where their lists begin and end
    # pre is float32 whatever e; halves are copied to their own dtype in the end.
    pre = sums * (4 if x.e == 4 else 4 + 4 + x.e)
    encoder = (x.N + x.F) * x.D * x.e + x.N * x.K * (x.e + 8) + x.F * x.e
    product = 2 * x.N * x.F * x.D
    tiles = x.N * x.K * (x.e + 8) + _tiles(x.N, x.F, x)
    read = min(walks, sums) * x.e  # of the gradient of pre, where a latent and a connection meet
    unit = "bf16" if x.e == 2 else "fp32"
    lists = kept * (x.p + x.e)
    select = (x.F + x.U) * x.D * x.e + x.U * 4 + kept * 8
    return {
        "topk_encode forward": Cost(product, tiles, encoder, unit),
        "sparse_decode forward": decode["gather_sum"],
        "sparse_decode d_values": decode["row_dots"],
        "sparse_decode dW": decode["transposed"],
        "virtual_weights forward": virtual["row_dots"],
        "virtual_weights dW": virtual["gather_sum"],
        "virtual_weights dE": virtual["transposed"],
        "virtual_matmul forward": Cost(
            2 * walks, z_lists + slots * x.e + walks * (x.p + x.e) + pre, z_lists + slots * x.e + lists + sums * x.e
        ),
        "virtual_matmul dz": Cost(
            2 * walks,
            z_lists + slots * x.e + walks * (x.p + 2 * x.e),
            z_lists + slots * x.e + min(lists, walks * (x.p + x.e)) + read,
        ),
        "virtual_matmul dV": Cost(
            2 * walks,
            kept * (x.p + x.i + 2 * x.p + x.e) + walks * (x.p + 2 * x.e),
            kept * (x.p + x.i + x.e) + slots * (x.p + x.e) + read,
        ),
        "connected_encode forward": Cost(
            product + 2 * walks,
            tiles + z_lists + slots * x.e + walks * (x.p + x.e),
            encoder + z_lists + slots * x.e + lists + x.N * 4,
            unit,
        ),
        "select_connections": Cost(2 * x.F * x.U * x.D, _tiles(x.F, x.U, x) + kept * 8, select, unit),
    }


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


def asked(name: str, run: Callable[[], object], x: Sizes, walks: float = 0.0) -> float:
    """Bytes that `run` requests over the bytes that the formula uses."""
    with counted() as counter:
        run()
    return counter.total / costs(x, walks or x.walks)[name].used


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
    return {
        "virtual_matmul forward": asked("virtual_matmul forward", lambda: virtual_matmul.forward(*arguments), x, walks),
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


def seconds(cost: Cost, gpu: Gpu) -> tuple[float, float]:
    """At least, and without cache."""
    arithmetic = cost.flops / getattr(gpu, cost.unit)
    return max(arithmetic, cost.once / gpu.bandwidth), max(arithmetic, cost.used / gpu.bandwidth)


def table(measured: dict[str, float]) -> str:
    x = Sizes()
    lines = [
        "| op and pass | flops | bytes used | bytes once | H100 at least | H100 without cache | A100 at least |"
        " A100 without cache | asked / used |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cost in costs(x, x.walks).items():
        times = [f"{1e6 * t:.0f} us" for gpu in (H100, A100) for t in seconds(cost, gpu)]
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
