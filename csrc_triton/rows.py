"""Three products with gathered rows, the building blocks of most ops and gradients.

A bag is a token with its active latents, or a latent with its connections: `weights` and `indices` [N, K] name K of
the `rows` [R, D]. An index of -1 is an empty slot, worth zero. One program sums each output in float32 and in a fixed
order, without atomics, so runs agree to the last bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import PARTS_BYTES, LaunchConfig, cdiv, check_range, launcher

PART = 256  # slots of a list that one program sums; longer lists (hot latents) are cut into such parts


@dataclass(frozen=True)
class Tile(LaunchConfig):
    """A tile of gathered rows: all its loads are in flight together, 16 bytes per thread where the rows allow it."""

    slots: int = 8
    columns: int = 512

    @property
    def constexprs(self) -> dict[str, int]:
        return {"SLOTS": self.slots, "COLUMNS": self.columns}


WIDE = Tile(num_warps=4, slots=8, columns=512)
MIDDLE = Tile(num_warps=4, slots=16, columns=256)
NARROW = Tile(num_warps=2, slots=16, columns=64)
TILES = {"wide": WIDE, "middle": MIDDLE, "narrow": NARROW}


def tile_for(D: int) -> Tile:
    """Wide tiles, unless the last one would lie mostly outside the row."""
    if D <= 64:
        return NARROW
    return WIDE if -D % WIDE.columns <= D // 8 else MIDDLE


@triton.jit
def gather_sum_kernel(
    out,  # [N, D]
    weights,  # [N, K]
    indices,  # [N, K] int32 or int64
    rows,  # [R, D]
    K, D,
    out_n, out_d, weights_n, weights_k, indices_n, indices_k, rows_r, rows_d,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One bag and one block of columns. Blocks are the slow grid axis: one slice of all rows at a time stays in L2."""
    n = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    sums = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for start in range(0, K, SLOTS):
        k = start + tl.arange(0, SLOTS).to(tl.int64)
        index = tl.load(indices + n * indices_n + k * indices_k, mask=k < K, other=-1).to(tl.int64)
        used = index >= 0
        weight = tl.load(weights + n * weights_n + k * weights_k, mask=used, other=0).to(tl.float32)
        row = tl.load(
            rows + index[:, None] * rows_r + columns[None, :] * rows_d, mask=used[:, None] & inside[None, :], other=0
        )
        sums += weight[:, None] * row.to(tl.float32)
    tl.store(out + n * out_n + columns * out_d, tl.sum(sums, 0), mask=inside)


@launcher
def gather_sum(weights: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """[N, D]: each bag's weighted sum of the rows that it names, in the dtype of `rows`.

    Equivalent to `(weights[:, :, None] * rows[indices]).sum(1)`, with zeros for empty slots.
    """
    (N, K), (R, D) = indices.shape, rows.shape
    check_range("indices", indices, R)
    if 0 in (N, K, R, D):
        return rows.new_zeros(N, D)
    out = rows.new_empty(N, D)
    tile = tile_for(D)
    gather_sum_kernel[N, cdiv(D, tile.columns)](
        out, weights, indices, rows, K, D,
        *out.stride(), *weights.stride(), *indices.stride(), *rows.stride(),
        **tile.constexprs, **tile.options,
    )  # fmt: skip
    return out


@triton.jit
def row_dots_kernel(
    out,  # [N, K]
    bags,  # [N, D]
    indices,  # [N, K] int32 or int64
    rows,  # [R, D]
    K, D,
    out_n, out_k, bags_n, bags_d, indices_n, indices_k, rows_r, rows_d,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One bag and one block of its slots."""
    n = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    index = tl.load(indices + n * indices_n + k * indices_k, mask=k < K, other=-1).to(tl.int64)
    used = index >= 0
    sums = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for start in range(0, D, COLUMNS):
        columns = start + tl.arange(0, COLUMNS).to(tl.int64)
        inside = columns < D
        bag = tl.load(bags + n * bags_n + columns * bags_d, mask=inside, other=0).to(tl.float32)
        row = tl.load(
            rows + index[:, None] * rows_r + columns[None, :] * rows_d, mask=used[:, None] & inside[None, :], other=0
        )
        sums += bag[None, :] * row.to(tl.float32)
    # An empty slot is worth 0 whatever its bag holds; without this, NaN x 0 would be NaN.
    dots = tl.where(used, tl.sum(sums, 1), 0.0)
    tl.store(out + n * out_n + k * out_k, dots, mask=k < K)


@launcher
def row_dots(bags: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """[N, K]: the dot product of each bag's own vector (`bags` [N, D]) with each row that it names.

    Equivalent to `(bags @ rows.T).gather(1, indices)`, with zeros for empty slots.
    """
    (N, K), (R, D) = indices.shape, rows.shape
    check_range("indices", indices, R)
    if 0 in (N, K, R, D):
        return rows.new_zeros(N, K)
    out = rows.new_empty(N, K)
    tile = NARROW if D <= NARROW.columns else MIDDLE
    row_dots_kernel[N, cdiv(K, tile.slots)](
        out, bags, indices, rows, K, D,
        *out.stride(), *bags.stride(), *indices.stride(), *rows.stride(),
        **tile.constexprs, **tile.options,
    )  # fmt: skip
    return out


@triton.jit
def _list_sum(
    weights, order, bags, low, high, columns, K, D,
    weights_n, weights_k, bags_n, bags_d,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sum over the slots `low` to `high` of `order`."""
    inside = columns < D
    sums = tl.zeros([SLOTS, COLUMNS], tl.float32)
    for start in range(low, high, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        used = slot < high
        position = tl.load(order + slot, mask=used, other=0)
        n = (position // K).to(tl.int64)
        k = (position % K).to(tl.int64)
        weight = tl.load(weights + n * weights_n + k * weights_k, mask=used, other=0).to(tl.float32)
        bag = tl.load(
            bags + n[:, None] * bags_n + columns[None, :] * bags_d, mask=used[:, None] & inside[None, :], other=0
        )
        sums += weight[:, None] * bag.to(tl.float32)
    return tl.sum(sums, 0)


@triton.jit
def list_parts_kernel(
    parts,  # [B, 2, D] float32
    entries,  # [2, B]: which list holds the first and the last slot of each block of PART slots
    weights,  # [N, K]
    order,  # [N*K]
    starts,  # [R+1]
    bags,  # [N, D]
    total, R, K, D,
    weights_n, weights_k, bags_n, bags_d,
    PART: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """A block of PART slots meets at most two lists longer than itself: one holds its first slot, one its last."""
    block = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    side = tl.program_id(2)
    blocks = tl.num_programs(0)
    entry = tl.load(entries + side * blocks + block).to(tl.int64)
    other = tl.load(entries + block).to(tl.int64)
    low = tl.load(starts + entry).to(tl.int64)
    high = tl.load(starts + entry + 1, mask=entry < R, other=total).to(tl.int64)
    wanted = (entry > 0) & (high - low > PART) & ((side == 0) | (entry != other))
    low = tl.maximum(low, block * PART)
    high = tl.where(wanted, tl.minimum(high, (block + 1) * PART), low)
    if wanted:
        sums = _list_sum(
            weights, order, bags, low, high, columns, K, D, weights_n, weights_k, bags_n, bags_d, SLOTS, COLUMNS
        )
        tl.store(parts + (block * 2 + side) * D + columns, sums, mask=columns < D)


@triton.jit
def transposed_gather_sum_kernel(
    out,  # [R, D]
    parts,  # [B, 2, D] float32
    weights,  # [N, K]
    order,  # [N*K]
    starts,  # [R+1]
    bags,  # [N, D]
    total, R, K, D,
    out_r, out_d, weights_n, weights_k, bags_n, bags_d,
    PART: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row and one block of its columns: written exactly once, even if no bag names the row."""
    r = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    low = tl.load(starts + r + 1).to(tl.int64)
    high = tl.load(starts + r + 2, mask=r + 1 < R, other=total).to(tl.int64)
    hot = high - low > PART
    short = tl.where(hot, low, high)  # the parts of a hot row are already summed
    sums = _list_sum(
        weights, order, bags, low, short, columns, K, D, weights_n, weights_k, bags_n, bags_d, SLOTS, COLUMNS
    )
    if hot:
        first = low // PART
        last = (high - 1) // PART
        of_parts = tl.zeros([SLOTS, COLUMNS], tl.float32)
        for start in range(first, last + 1, SLOTS):
            block = start + tl.arange(0, SLOTS)
            side = tl.where((block == first) & (low % PART != 0), 1, 0)
            of_parts += tl.load(
                parts + (block * 2 + side)[:, None] * D + columns[None, :],
                mask=(block <= last)[:, None] & inside[None, :],
                other=0,
            )
        sums += tl.sum(of_parts, 0)
    tl.store(out + r * out_r + columns * out_d, sums, mask=inside)


@launcher
def transposed_gather_sum(weights: Tensor, order: Tensor, starts: Tensor, bags: Tensor) -> Tensor:
    """[R, D]: for each row, the weighted sum of the vectors `bags` [N, D] of the bags that name it.

    Equivalent to `dense.T @ bags`, where `dense` [N, R] has the `weights` [N, K] scattered to the rows they name.
    `order` and `starts` come from `transpose(indices, R)`. Lists of more than PART slots are summed in parts.
    """
    R, D, total = len(starts) - 1, bags.shape[1], len(order)
    if 0 in (total, R, D):
        return bags.new_zeros(R, D)
    out = bags.new_empty(R, D)
    tile, blocks = tile_for(D), cdiv(total, PART)
    if blocks == 1:
        no_parts = torch.empty(0, dtype=torch.float32, device=bags.device)
        _sum_lists(out, no_parts, None, weights, order, starts, bags, tile)
        return out
    firsts = torch.arange(blocks, dtype=starts.dtype, device=starts.device) * PART
    edges = torch.stack([firsts, (firsts + (PART - 1)).clamp_max(total - 1)])
    entries = torch.searchsorted(starts, edges, right=True) - 1
    width = min(D, max(tile.columns, PARTS_BYTES // (blocks * 8) // tile.columns * tile.columns))
    parts = torch.empty(blocks * 2 * width, dtype=torch.float32, device=bags.device)
    for column in range(0, D, width):
        columns = slice(column, column + width)
        _sum_lists(out[:, columns], parts, entries, weights, order, starts, bags[:, columns], tile)
    return out


def _sum_lists(
    out: Tensor,
    parts: Tensor,
    entries: Tensor | None,
    weights: Tensor,
    order: Tensor,
    starts: Tensor,
    bags: Tensor,
    tile: Tile,
) -> None:
    """`transposed_gather_sum` of one slice of columns; `entries` is None where no list can be longer than PART."""
    R, D = out.shape
    sizes = len(order), R, weights.shape[1], D
    strides = *weights.stride(), *bags.stride()
    shape = {"PART": PART, **tile.constexprs}
    column_blocks = cdiv(D, tile.columns)
    if entries is not None:
        list_parts_kernel[entries.shape[1], column_blocks, 2](
            parts, entries, weights, order, starts, bags, *sizes, *strides, **shape, **tile.options
        )
    transposed_gather_sum_kernel[R, column_blocks](
        out, parts, weights, order, starts, bags, *sizes, *out.stride(), *strides, **shape, **tile.options
    )
