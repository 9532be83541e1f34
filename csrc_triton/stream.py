"""Top-k of [N, columns] scores that never exist as a whole: one block of rows and columns at a time, within a budget.

Blocks of at least ROWS_WANTED rows keep the product efficient; rows too long for that are cut into pieces of
columns. The top-k of the pieces' own top-k is the exact answer, and W_enc is read once per block of rows however many
pieces there are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .launch import cdiv, spans
from .place import LONG, place
from .select import group_size, select

ROWS_WANTED = 1024
ALIGNMENT = 128  # of a block's rows and columns: whole tiles, and no group crosses a block

# fill(rows, columns, scores [n, c] fp32, maxima [n, groups] int32 or None, group) computes a block of scores.
Fill = Callable[[slice, slice, Tensor, Tensor | None, int], None]


@dataclass(frozen=True)
class Blocks:
    """Size of a block, and the number of pieces that a row is cut into."""

    rows: int
    columns: int
    pieces: int


def plan(N: int, columns: int, k: int, scratch_bytes: int, whole_rows: bool = False, more_bytes: int = 0) -> Blocks:
    """The largest blocks within the budget (at least one row and 4 k columns); `more_bytes`: other scratch per row."""
    piece = max(scratch_bytes // (4 * ROWS_WANTED), 4 * k) // ALIGNMENT * ALIGNMENT
    piece = columns if whole_rows else min(max(piece, ALIGNMENT, k), columns)
    pieces = cdiv(columns, piece)
    row_bytes = 4 * (piece + _most_groups(piece, columns, k) + k + 2 * k * (pieces + (pieces > 1)))
    row_bytes += more_bytes + (32 * k if k > LONG else 0)  # torch.sort
    rows = min(max(scratch_bytes // row_bytes, 1), N)
    return Blocks(rows if rows in (N, 1) or rows < ALIGNMENT else rows // ALIGNMENT * ALIGNMENT, piece, pieces)


def _groups(columns: int, k: int) -> int:
    group = group_size(columns, k)
    return cdiv(columns, group) if group > 1 else 0


def _most_groups(piece: int, columns: int, k: int) -> int:
    last = (columns - 1) % piece + 1
    return max(_groups(piece, k), _groups(last, min(k, last)))


def streamed_topk(
    fill: Fill,
    N: int,
    columns: int,
    k: int,
    scratch_bytes: int,
    out_values: Tensor | None,
    out_ids: Tensor,
    *,
    relu: bool = False,
    absolute: bool = False,
    whole_rows: bool = False,
    row_bytes: int = 0,
) -> None:
    """Writes the k largest of each row, descending, to `out_values` [N, k] (if given) and `out_ids` [N, k] int64.

    `relu` stores negative values as 0, `absolute` ranks by magnitude, `whole_rows` keeps rows in one piece.
    `row_bytes`: scratch that `fill` needs per row.
    """
    if N == 0 or k == 0:
        return
    blocks = plan(N, columns, k, scratch_bytes, whole_rows, row_bytes)

    def scratch(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(blocks.rows * width, dtype=dtype, device=out_ids.device)

    scores = scratch(blocks.columns, torch.float32)
    maxima = scratch(_most_groups(blocks.columns, columns, k), torch.int32)
    winners = scratch(k, torch.int32)
    kept_columns = sum(min(k, span.stop - span.start) for span in spans(columns, blocks.columns))
    kept_values, kept_ids = scratch(kept_columns, torch.float32), scratch(kept_columns, torch.int32)
    if blocks.pieces > 1:
        best_values, best_ids = scratch(k, torch.float32), scratch(k, torch.int32)

    for rows in spans(N, blocks.rows):
        n = rows.stop - rows.start
        values, ids = _matrix(kept_values, n, kept_columns), _matrix(kept_ids, n, kept_columns)
        for piece, span in enumerate(spans(columns, blocks.columns)):
            width = span.stop - span.start
            keep = min(k, width)
            group = group_size(width, keep)
            block = _matrix(scores, n, width)
            tops = _matrix(maxima, n, cdiv(width, group)) if group > 1 else None
            fill(rows, span, block, tops, group)
            kept = slice(piece * k, piece * k + keep)
            select(
                block, tops, group, keep, _matrix(winners, n, k), ids[:, kept], values[:, kept],
                absolute=absolute, first_id=span.start,
            )  # fmt: skip
        if blocks.pieces > 1:
            merged_values, merged_ids = _matrix(best_values, n, k), _matrix(best_ids, n, k)
            select(values, None, 1, k, _matrix(winners, n, k), merged_ids, merged_values, absolute=absolute, labels=ids)
            values, ids = merged_values, merged_ids
        place(
            values, ids, None if out_values is None else out_values[rows], out_ids[rows], relu=relu, absolute=absolute
        )


def _matrix(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)
