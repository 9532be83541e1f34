"""The C upstream latents that matter most to each downstream latent; the [F, U] scores never exist as a whole.

Tiles of importance x virtual weight, with group maxima, are streamed through the selection of topk_encode (stream.py,
select.py). There is no gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launcher
from .scores import dot_tile, store_tile, tile_config
from .stream import streamed_topk


@triton.jit
def connection_scores_kernel(
    W_enc,  # [H, n, D] downstream encoder rows
    E,  # [U, D] effective decoders upstream
    importance,  # [n, U]
    scores,  # [n, U] fp32
    maxima,  # [n, ceil(U / GROUP)] int32 keys
    H, n, U, D,
    W_head, W_row, W_col, E_row, E_col, importance_row, importance_col, scores_row, maxima_row,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    RUN: tl.constexpr,
    MANY_HEADS: tl.constexpr,
):  # fmt: skip
    """One tile of importance x |W_enc @ E.T|; with many heads, x the norm over heads."""
    tile = tl.program_id(0)
    row_tiles = tl.cdiv(n, ROWS)
    rows = (tile % row_tiles) * ROWS + tl.arange(0, ROWS)
    first = (tile // row_tiles) * COLUMNS
    columns = first + tl.arange(0, COLUMNS)
    if MANY_HEADS:
        squares = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in range(H):
            part = dot_tile(W_enc, E, rows, columns, n, U, D, W_row, W_col, E_row, E_col, DEPTH, PRECISION, UPCAST, RUN)
            squares += part * part
            W_enc += W_head
        size = tl.sqrt_rn(squares)
    else:
        size = tl.abs(
            dot_tile(W_enc, E, rows, columns, n, U, D, W_row, W_col, E_row, E_col, DEPTH, PRECISION, UPCAST, RUN)
        )
    weight = tl.load(
        importance + rows.to(tl.int64)[:, None] * importance_row + columns.to(tl.int64)[None, :] * importance_col,
        mask=(rows < n)[:, None] & (columns < U)[None, :],
        other=0.0,
    )
    size *= weight.to(tl.float32)
    store_tile(size, scores, maxima, rows, columns, first, n, U, scores_row, maxima_row, False, GROUP)


@launcher
def forward(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int) -> Tensor:
    """[F, C] int64 ids of upstream latents, best first, ties to the lowest id.

    Equivalent to `(importance * (W_enc @ E.T).norm(dim=0)).topk(C).indices`. `W_enc` [H, F, D] with one head or
    several, `E` [U, D], `importance` [U], or [F, U] for one per pair. `scratch_bytes` bounds working memory.
    """
    F, U = W_enc.shape[1], len(E)
    if not 1 <= C <= U:
        raise ValueError(f"C: expected from 1 to {U}, the number of upstream latents, got {C}")
    if E.dtype != W_enc.dtype:
        raise TypeError(f"E: expected {W_enc.dtype}, the dtype of W_enc, got {E.dtype}; cast one of them")
    importance = importance.expand(F, U)  # a view: the kernel reads it by its strides
    connections = torch.empty(F, C, dtype=torch.int64, device=E.device)

    def fill(rows: slice, columns: slice, scores: Tensor, maxima: Tensor | None, group: int) -> None:
        _connection_scores(W_enc[:, rows], E[columns], importance[rows, columns], scores, maxima, group)

    streamed_topk(fill, F, U, C, scratch_bytes, None, connections)
    return connections


def _connection_scores(
    W_enc: Tensor, E: Tensor, importance: Tensor, scores: Tensor, maxima: Tensor | None, group: int
) -> None:
    """Writes `importance * (W_enc @ E.T).norm(dim=0)` to `scores` [n, U] fp32, for W_enc [H, n, D]; see scores.py."""
    (H, n, D), U = W_enc.shape, len(E)
    config = tile_config(W_enc.dtype, max_registers=None)  # importance and squares need more
    tops = scores if maxima is None else maxima
    connection_scores_kernel[(cdiv(n, config.rows) * cdiv(U, config.columns),)](
        W_enc, E, importance, scores, tops, H, n, U, D,
        *W_enc.stride(), *E.stride(), *importance.stride(), scores.stride(0), tops.stride(0),
        MANY_HEADS=H > 1, GROUP=1 if maxima is None else group, **config.constexprs, **config.options,
    )  # fmt: skip
