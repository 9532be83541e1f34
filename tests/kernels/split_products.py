"""fp32 products on tensor cores, emulated exactly on the CPU: numbers are split into parts of few bits, the parts are
multiplied exactly, and sums are rounded to fp32 as often as the instructions do."""

import torch
from torch import Tensor

# The products of parts, smallest first, as Triton issues them: (part of a, part of b), each with its parts' dtype.
PRODUCTS = {
    "tf32": ("tf32", [(0, 0)]),
    "tf32x3": ("tf32", [(1, 0), (0, 1), (0, 0)]),
    "bf16x6": ("bf16", [(1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0)]),
}


def rounded(x: Tensor, kind: str) -> Tensor:
    """fp32 numbers with the mantissa of TF32 (ties away from zero) or bf16 (ties to even)."""
    if kind == "bf16":
        return x.bfloat16().float()
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def parts(x: Tensor, kind: str, count: int) -> list[Tensor]:
    """The leading part, that of what it leaves, and so on."""
    found = []
    for _ in range(count):
        found.append(rounded(x, kind))
        x = x - found[-1]
    return found


def product(a: Tensor, b: Tensor, precision: str, run: int, instruction: int = 8) -> Tensor:
    """`a @ b.T` [n, F] fp32 of a [n, D], b [F, D] fp32, in sums over `run` of D that are then added up. An instruction
    adds the exact sum of `instruction` products to an fp32 accumulator."""
    kind, pairs = PRODUCTS[precision]
    count, depth = 1 + max(max(pair) for pair in pairs), 32
    of_a, of_b = (parts(x, kind, count) for x in (a, b))
    whole = torch.zeros(len(a), len(b))
    for first in range(0, a.shape[1], run):
        total = torch.zeros_like(whole)
        for start in range(first, min(first + run, a.shape[1]), depth):
            for i, j in pairs:
                for k in range(start, start + depth, instruction):
                    step = slice(k, k + instruction)
                    total = (total.double() + of_a[i][:, step].double() @ of_b[j][:, step].double().T).float()
        whole += total
    return whole
