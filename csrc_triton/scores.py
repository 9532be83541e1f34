"""Scores of all columns for a block of rows, and the maximum of each group of neighbouring columns.

A score is what a top-k ranks: the pre-activation of a latent, or the importance of a connection. Scores go to a
scratch buffer of bounded size in fp32, whatever the input dtype, so that selection sees what was accumulated.
The group maxima bound the k-th largest score from below (see select.py) and cost nothing here: the tile is
still in registers.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import INTERPRETED, AheadOfTime, ahead_of_time_case, cdiv

LOWEST = tl.constexpr(-(2**31))  # the key of nothing: below that of every float, -inf included


@dataclass(frozen=True)
class TileConfig:
    """Tile of the product: rows x columns, `depth` of D at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    precision: str

    @property
    def constexprs(self) -> dict[str, int | str | bool]:
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "PRECISION": self.precision,
            "UPCAST": INTERPRETED,
        }

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# fp32 products on TF32 tensor cores miss the error bound (10 bits of mantissa), so they run on the CUDA cores: 67
# TFLOP/s on an H100 against about 990 of bf16, so that encoding fp32 inputs is bound by this product. Three TF32
# products ("tf32x3") would be nearly fp32 and several times faster: they compile for NVIDIA (170 registers, no spill)
# but not for gfx942, and their error cannot be measured without a GPU, hence not here yet.
FLOAT32 = TileConfig(rows=64, columns=128, depth=16, warps=8, stages=3, precision="ieee")
HALF = TileConfig(rows=128, columns=128, depth=64, warps=8, stages=3, precision="tf32")  # precision: fp32 only


@triton.jit
def float_key(value, ABSOLUTE: tl.constexpr):
    """int32 that orders as the fp32 `value` does; -0 equals +0; NaN, of any sign, is the largest."""
    value = tl.abs(value) if ABSOLUTE else value
    bits = tl.where(value == 0.0, 0, value.to(tl.int32, bitcast=True))
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(value == value, key, 0x7FFFFFFF)


@triton.jit
def _dot_tile(
    a,  # [n, D]
    b,  # [F, D]
    rows,
    columns,
    n,
    F,
    D,
    a_row,
    a_col,
    b_row,
    b_col,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """fp32 tile of a @ b.T. Rows and columns past the end repeat the last one, and are dropped by the store."""
    depth = tl.arange(0, DEPTH)
    a_tile = a + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * a_row + depth.to(tl.int64)[None, :] * a_col
    b_tile = b + tl.minimum(columns, F - 1).to(tl.int64)[None, :] * b_row + depth.to(tl.int64)[:, None] * b_col
    a_step = tl.full((), DEPTH, tl.int64) * a_col
    b_step = tl.full((), DEPTH, tl.int64) * b_col
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
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
    return total


@triton.jit
def _store_tile(
    tile,
    scores,  # [n, F] fp32
    maxima,  # [n, ceil(F / GROUP)] int32 keys
    rows,
    columns,
    n,
    F,
    scores_row,
    maxima_row,
    ABSOLUTE: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_offsets = rows.to(tl.int64)[:, None]
    valid = (rows < n)[:, None] & (columns < F)[None, :]
    tl.store(scores + row_offsets * scores_row + columns[None, :], tile, mask=valid)
    if GROUP > 1:
        key = tl.where((columns < F)[None, :], float_key(tile, ABSOLUTE), LOWEST)
        GROUPS: tl.constexpr = columns.shape[0] // GROUP
        largest = tl.max(tl.reshape(key, (rows.shape[0], GROUPS, GROUP)), axis=2)
        groups = tl.min(columns, axis=0) // GROUP + tl.arange(0, GROUPS)
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
    n,
    F,
    D,
    x_row,
    x_col,
    W_row,
    W_col,
    b_step,
    scale_step,
    scores_row,
    maxima_row,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # Rows vary fastest: programs that run together share a tile of W_enc, and all rows of x stay in L2.
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(n, ROWS)
    rows = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    columns = (tile // row_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    total = _dot_tile(x, W_enc, rows, columns, n, F, D, x_row, x_col, W_row, W_col, DEPTH, PRECISION, UPCAST)
    if HAS_SCALE:
        total /= tl.load(scale + rows * scale_step, mask=rows < n, other=1.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        total += tl.load(b_enc + columns.to(tl.int64) * b_step, mask=columns < F, other=0.0).to(tl.float32)[None, :]
    _store_tile(total, scores, maxima, rows, columns, n, F, scores_row, maxima_row, ABSOLUTE, GROUP)


@triton.jit
def connection_scores_kernel(
    W_enc,  # [H, n, D] downstream encoder rows
    E,  # [U, D] effective decoders upstream
    importance,  # [n, U]
    scores,  # [n, U] fp32
    maxima,  # [n, ceil(U / GROUP)] int32 keys
    H,
    n,
    U,
    D,
    W_head,
    W_row,
    W_col,
    E_row,
    E_col,
    importance_row,
    importance_col,
    scores_row,
    maxima_row,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(n, ROWS)
    rows = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    columns = (tile // row_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    if MANY_HEADS:
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in range(H):
            part = _dot_tile(W_enc, E, rows, columns, n, U, D, W_row, W_col, E_row, E_col, DEPTH, PRECISION, UPCAST)
            squares += part * part
            W_enc += W_head
        size = tl.sqrt_rn(squares)
    else:
        size = tl.abs(_dot_tile(W_enc, E, rows, columns, n, U, D, W_row, W_col, E_row, E_col, DEPTH, PRECISION, UPCAST))
    weight = tl.load(
        importance + rows.to(tl.int64)[:, None] * importance_row + columns.to(tl.int64)[None, :] * importance_col,
        mask=(rows < n)[:, None] & (columns < U)[None, :],
        other=0.0,
    )
    _store_tile(
        size * weight.to(tl.float32),
        scores,
        maxima,
        rows,
        columns,
        n,
        U,
        scores_row,
        maxima_row,
        False,
        GROUP,
    )


MAXIMA_ROWS, MAXIMA_COLUMNS = 16, 512


@triton.jit
def maxima_kernel(
    scores,  # [n, F] fp32
    maxima,  # [n, ceil(F / GROUP)] int32 keys, out
    n,
    F,
    scores_row,
    maxima_row,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    valid = (rows < n) & (columns < F)
    key = float_key(tl.load(scores + rows * scores_row + columns, mask=valid, other=0.0), False)
    key = tl.where(valid, key, LOWEST)
    largest = tl.max(tl.reshape(key, (ROWS, COLUMNS // GROUP, GROUP)), axis=2)
    groups = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)[None, :]
    tl.store(maxima + rows * maxima_row + groups, largest, mask=(rows < n) & (groups < tl.cdiv(F, GROUP)))


def group_maxima(scores: Tensor, maxima: Tensor, group: int) -> None:
    """Group maxima of scores [n, F] that were changed after `encoder_scores` wrote them."""
    n, F = scores.shape
    maxima_kernel[cdiv(n, MAXIMA_ROWS), cdiv(F, MAXIMA_COLUMNS)](
        scores, maxima, n, F, scores.stride(0), maxima.stride(0),
        GROUP=group, ROWS=MAXIMA_ROWS, COLUMNS=MAXIMA_COLUMNS, num_warps=8,
    )  # fmt: skip


def tile_config(dtype: torch.dtype) -> TileConfig:
    return FLOAT32 if dtype == torch.float32 else HALF


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
    """`x @ W_enc.T / scale + b_enc` into `scores` [n, F] fp32, group maxima as keys into `maxima`."""
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


def connection_scores(
    W_enc: Tensor, E: Tensor, importance: Tensor, scores: Tensor, maxima: Tensor | None, group: int
) -> None:
    """`importance * (W_enc @ E.T).norm(dim=0)` into `scores` [n, U] fp32, for W_enc [H, n, D]."""
    (H, n, D), U = W_enc.shape, len(E)
    config = tile_config(W_enc.dtype)
    tops = scores if maxima is None else maxima
    connection_scores_kernel[(cdiv(n, config.rows) * cdiv(U, config.columns),)](
        W_enc, E, importance, scores, tops, H, n, U, D,
        *W_enc.stride(), *E.stride(), *importance.stride(), scores.stride(0), tops.stride(0),
        MANY_HEADS=H > 1, GROUP=1 if maxima is None else group, **config.constexprs, **config.options,
    )  # fmt: skip


ELEMENTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def ahead_of_time_encoder(elements: tuple[str, ...] = tuple(ELEMENTS), **constexprs: object) -> list[AheadOfTime]:
    """The configurations of `encoder_scores`: one a dtype."""
    flags = {"HAS_BIAS": True, "HAS_SCALE": False, "ABSOLUTE": False, "GROUP": 16} | constexprs
    pointers = {"x": "", "W_enc": "", "b_enc": "", "scale": "fp32", "scores": "fp32", "maxima": "i32"}
    sizes = {"n": "i32", "F": "i32", "D": "i32:16"}
    strides = {"x_row": "i32:16", "W_row": "i32:16", "scores_row": "i32:16", "maxima_row": "i32:16"}
    return [
        _ahead(encoder_scores_kernel, e, tile_config(ELEMENTS[e]), pointers, sizes | strides, flags) for e in elements
    ]


def ahead_of_time_connections() -> list[AheadOfTime]:
    """The configurations of `connection_scores`: one a dtype, with one head and with several."""
    pointers = {"W_enc": "", "E": "", "importance": "", "scores": "fp32", "maxima": "i32"}
    sizes = {"H": "i32", "n": "i32", "U": "i32", "D": "i32:16", "W_head": "i32:16"}
    strides = {
        "W_row": "i32:16",
        "E_row": "i32:16",
        "importance_row": "i32",
        "scores_row": "i32:16",
        "maxima_row": "i32:16",
    }
    return [
        _ahead(connection_scores_kernel, e, tile_config(d), pointers, sizes | strides, {"GROUP": 16, "MANY_HEADS": m})
        for e, d in ELEMENTS.items()
        for m in (False, True)
    ]


def _ahead(
    kernel: Any,
    element: str,
    config: TileConfig,
    pointers: dict[str, str],
    integers: dict[str, str],
    flags: dict[str, object],
) -> AheadOfTime:
    constexprs = {**flags, **config.constexprs, "UPCAST": False}
    known = {name: f"*{kind or element}:16" for name, kind in pointers.items()} | integers
    constexprs |= {name: 1 for name in kernel.arg_names if name not in known and name not in constexprs}
    name = kernel.__name__.removesuffix("_kernel")
    which = "".join(f" {f.lower()}" for f, on in flags.items() if on is True)
    return ahead_of_time_case(f"{name} {element}{which}", kernel, known, constexprs, config.options)


def ahead_of_time_maxima() -> list[AheadOfTime]:
    flags = {"GROUP": 16, "ROWS": MAXIMA_ROWS, "COLUMNS": MAXIMA_COLUMNS}
    types = {"scores": "*fp32:16", "maxima": "*i32:16"}
    return [ahead_of_time_case("maxima", maxima_kernel, types, flags, {"num_warps": 8, "num_stages": 3})]
