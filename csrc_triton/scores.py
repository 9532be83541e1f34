"""Scores of all columns for a block of rows, and the maximum of each group of neighbouring columns.

A score is what a top-k ranks: the pre-activation of a latent, or the importance of a connection. Scores go to a
scratch buffer of bounded size in fp32, whatever the input dtype, so that selection sees the accumulated sums.
The group maxima bound the k-th largest score from below (see select.py). They are nearly free here, while the
tile is still in registers.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, LaunchConfig, cdiv

LOWEST = tl.constexpr(-(2**31))  # the key of no score at all: below that of every float, -inf included


@dataclass(frozen=True)
class TileConfig(LaunchConfig):
    """Tile of a matrix product: `rows` x `columns`, `depth` of D at a time."""

    rows: int = 128
    columns: int = 128
    depth: int = 64
    precision: str = "tf32"  # of fp32 products; halves ignore it
    run: int = 0  # steps of `depth` that are summed before they are added to the rest; 0: all

    @property
    def constexprs(self) -> dict[str, int | str | bool]:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "PRECISION": self.precision,
            "UPCAST": INTERPRETED,
            "RUN": self.run,
        }


# "tf32x3": three TF32 products on tensor cores, in sums over 256 of D: at most twice the error of torch's own fp32
# product, by exact emulation. "ieee": the CUDA cores. "tf32": one product, with 10 bits of mantissa.
FLOAT32 = {
    "tf32x3": TileConfig(num_warps=8, rows=128, columns=64, depth=32, precision="tf32x3", run=8),
    "ieee": TileConfig(num_warps=8, rows=64, columns=128, depth=16, precision="ieee"),
    "tf32": TileConfig(num_warps=8, rows=128, columns=128, depth=32, precision="tf32"),
}
# 128 registers a thread: two blocks share an SM, and one multiplies while the other writes its scores.
HALF = TileConfig(num_warps=8, rows=128, columns=128, depth=64, max_registers=128)


def fp32_precision() -> str:
    """How fp32 is multiplied: a name in FLOAT32. torch's own setting decides: "tf32" or "ieee" where
    `torch.backends.cuda.matmul.fp32_precision` says so (or `allow_tf32`), otherwise "tf32x3"; on ROCm always "ieee"."""
    if torch.version.hip is not None:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    asked = getattr(matmul, "fp32_precision", "none")  # torch 2.9 and later
    if asked == "none" and matmul.allow_tf32:
        return "tf32"
    return asked if asked in FLOAT32 else "tf32x3"


def tile_config(dtype: torch.dtype, max_registers: int | None = HALF.max_registers) -> TileConfig:
    """The tile of a product of `dtype`; halves hold to `max_registers`."""
    return FLOAT32[fp32_precision()] if dtype == torch.float32 else replace(HALF, max_registers=max_registers)


@triton.jit
def float_key(value, ABSOLUTE: tl.constexpr):
    """An int32 that orders as the fp32 `value` does; -0 equals +0, and NaN of either sign is the largest."""
    value = tl.abs(value) if ABSOLUTE else value
    bits = tl.where(value == 0.0, 0, value.to(tl.int32, bitcast=True))
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value == value, key, 0x7FFFFFFF)


@triton.jit
def dot_tile(
    a,  # [n, D]
    b,  # [F, D]
    rows, columns, n, F, D,
    a_row, a_col, b_row, b_col,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """fp32 tile of a @ b.T. Rows and columns past the end repeat the last one; `store_tile` drops them.

    RUN: how many steps of DEPTH are summed before they are added to the rest, 0 for all: shorter sums round less.
    """
    depth = tl.arange(0, DEPTH)
    a_tile = a + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * a_row + depth.to(tl.int64)[None, :] * a_col
    b_tile = b + tl.minimum(columns, F - 1).to(tl.int64)[None, :] * b_row + depth.to(tl.int64)[:, None] * b_col
    a_step = tl.full((), DEPTH, tl.int64) * a_col
    b_step = tl.full((), DEPTH, tl.int64) * b_col
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    runs = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for start in range(0, D, DEPTH):
        inside = depth < D - start
        a_part = tl.load(a_tile, mask=inside[None, :], other=0.0)
        b_part = tl.load(b_tile, mask=inside[:, None], other=0.0)
        if UPCAST:  # the interpreter multiplies raw bf16 bits; on a GPU tensor cores want them as they are
            a_part = a_part.to(tl.float32)
            b_part = b_part.to(tl.float32)
        total = tl.dot(a_part, b_part, total, input_precision=PRECISION)
        a_tile += a_step
        b_tile += b_step
        if RUN > 0:
            if (start // DEPTH) % RUN == RUN - 1:
                runs += total
                total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    return total + runs if RUN > 0 else total


@triton.jit
def store_tile(
    tile,
    scores,  # [n, F] fp32
    maxima,  # [n, ceil(F / GROUP)] int32 keys
    rows, columns, first, n, F,
    scores_row, maxima_row,
    ABSOLUTE: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Writes a tile of scores, whose columns begin at `first`, and the key of the largest of each GROUP of them
    (GROUP 1: no maxima)."""
    row_offsets = rows.to(tl.int64)[:, None]
    valid = (rows < n)[:, None] & (columns < F)[None, :]
    tl.store(scores + row_offsets * scores_row + columns[None, :], tile, mask=valid)
    if GROUP > 1:
        key = tl.where((columns < F)[None, :], float_key(tile, ABSOLUTE), LOWEST)
        GROUPS: tl.constexpr = columns.shape[0] // GROUP
        largest = tl.max(tl.reshape(key, (rows.shape[0], GROUPS, GROUP)), axis=2)
        groups = first // GROUP + tl.arange(0, GROUPS)
        inside = (rows < n)[:, None] & (groups < tl.cdiv(F, GROUP))[None, :]
        tl.store(maxima + row_offsets * maxima_row + groups[None, :], largest, mask=inside)


@triton.jit
def encoder_scores_kernel(
    x,  # [n, D]
    W_enc,  # [F, D]
    b_enc,  # [F]
    scale,  # [n]
    scores,  # [n, F] fp32
    maxima,  # [n, ceil(F / GROUP)] int32 keys
    n, F, D,
    x_row, x_col, W_row, W_col, b_step, scale_step, scores_row, maxima_row,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    RUN: tl.constexpr,
):  # fmt: skip
    """One tile of pre-activations: x @ W_enc.T / scale + b_enc."""
    # Rows vary fastest: programs that run together share a tile of W_enc, and all rows of x stay in L2.
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(n, ROWS)
    rows = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    first = (tile // row_tiles) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    total = dot_tile(x, W_enc, rows, columns, n, F, D, x_row, x_col, W_row, W_col, DEPTH, PRECISION, UPCAST, RUN)
    if HAS_SCALE:
        total /= tl.load(scale + rows * scale_step, mask=rows < n, other=1.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(b_enc + columns.to(tl.int64) * b_step, mask=columns < F, other=0.0).to(tl.float32)[None, :]
    store_tile(total, scores, maxima, rows, columns, first, n, F, scores_row, maxima_row, ABSOLUTE, GROUP)


def encoder_scores(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    scale: Tensor | None,
    scores: Tensor,
    maxima: Tensor | None,
    group: int,
    *,
    absolute: bool = False,
) -> None:
    """Writes `x @ W_enc.T / scale + b_enc` to `scores` [n, F] fp32 and, if given, the keys of the maxima of each
    `group` of columns to `maxima` [n, ceil(F / group)] int32; keys of magnitudes if `absolute`.

    `x` [n, D], `W_enc` [F, D], `b_enc` [F], `scale` [n].
    """
    (n, D), F = x.shape, len(W_enc)
    config = tile_config(x.dtype)
    tops = scores if maxima is None else maxima
    encoder_scores_kernel[(cdiv(n, config.rows) * cdiv(F, config.columns),)](
        x, W_enc, x if b_enc is None else b_enc, x if scale is None else scale, scores, tops, n, F, D,
        *x.stride(), *W_enc.stride(),
        0 if b_enc is None else b_enc.stride(0), 0 if scale is None else scale.stride(0),
        scores.stride(0), tops.stride(0),
        HAS_BIAS=b_enc is not None, HAS_SCALE=scale is not None, ABSOLUTE=absolute,
        GROUP=1 if maxima is None else group, **config.constexprs, **config.options,
    )  # fmt: skip
