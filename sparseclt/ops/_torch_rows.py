"""The torch backend's products with gathered rows, on which its ops and their gradients are built.

`rows` is the public face of this file and says what a bag is. Sums are `embedding_bag`s, with int32 indices where they
fit: one pass gathers and adds, in a fixed order, in float32 for fp16 and bf16 rows, and rounds once.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sparseclt.ops.scratch import SCRATCH_BYTES

PAIR_BYTES = 28  # of a pair of slots whose product is added up: its place, its product, and both while they are sorted


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are added up: float32 for fp16 and bf16, otherwise their own."""
    return torch.promote_types(dtype, torch.float32)


def chunks(total: int, bytes_each: int, scratch_bytes: int) -> Iterator[slice]:
    """Consecutive slices of 0..total, each as long as `scratch_bytes` allows at `bytes_each` per entry (at least 1)."""
    size = max(1, scratch_bytes // max(1, bytes_each))
    return (slice(start, min(start + size, total)) for start in range(0, total, size))


def _index_dtype(indices: Tensor, rows: int) -> torch.dtype:
    return torch.int32 if max(indices.numel(), rows) < torch.iinfo(torch.int32).max else torch.int64


def fill_empty(weights: Tensor, indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Weights and indices as `embedding_bag` takes them: an empty slot names row 0 with weight 0."""
    ids = indices.clamp_min(0).to(_index_dtype(indices, rows))
    return weights.masked_fill(indices < 0, 0), ids


def gather_sum(weights: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """[N, D]: each bag's weighted sum of the rows that it names."""
    if indices.numel() == 0 or len(rows) == 0:
        return rows.new_zeros(len(indices), rows.shape[1])
    weights, ids = fill_empty(weights, indices, len(rows))
    return functional.embedding_bag(ids, rows, per_sample_weights=weights, mode="sum")


def row_dots(bags: Tensor, indices: Tensor, rows: Tensor, scratch_bytes: int = SCRATCH_BYTES["torch"]) -> Tensor:
    """[N, K]: the dot product of each bag's own vector with each row that it names."""
    if indices.numel() == 0 or len(rows) == 0:
        return rows.new_zeros(indices.shape)
    ids = indices.clamp_min(0).to(_index_dtype(indices, len(rows)))
    # The gradient of an embedding_bag's weights is this very product. The op is private to torch: guarded.
    product = getattr(torch.ops.aten, "_embedding_bag_per_sample_weights_backward", None)
    if product is not None:
        N, K = indices.shape
        bag_of = torch.arange(N, dtype=ids.dtype, device=ids.device)
        dots = product(bags, rows, ids.flatten(), bag_of * K, bag_of.repeat_interleave(K), 0).view(N, K)
    else:
        dots = rows.new_empty(indices.shape)
        for part in chunks(len(bags), indices.shape[1] * rows.shape[1] * rows.element_size(), scratch_bytes):
            torch.sum(bags[part, None] * rows[ids[part]], -1, out=dots[part])
    return dots.masked_fill_(indices < 0, 0)


class Transpose(NamedTuple):
    """The slots of `indices` [N, K] sorted by the row that they name (CSC), empty slots first.

    `order` [N*K]: positions in the flattened indices; `starts` [R+1]: where the empty slots begin, then where each
    row's slots begin. int32 where that is wide enough, otherwise int64.
    """

    order: Tensor
    starts: Tensor

    def bounds(self) -> Tensor:
        """[R+1]: where each row's slots begin, and where those of the last one end."""
        return torch.cat([self.starts[1:], self.starts.new_full((1,), len(self.order))])


def transpose(indices: Tensor, rows: int) -> Transpose:
    """Sorts the slots of `indices` by row, stably: the same indices give the same order on every run."""
    dtype = _index_dtype(indices, rows)
    keys, order = torch.sort(indices.flatten().to(dtype) + 1, stable=True)
    starts = torch.searchsorted(keys, torch.arange(rows + 1, dtype=dtype, device=keys.device))
    return Transpose(order.to(dtype), starts.to(dtype))


def transposed_gather_sum(weights: Tensor, order: Tensor, starts: Tensor, bags: Tensor) -> Tensor:
    """[R, D]: for each row, the weighted sum of the vectors `bags` [N, D] of the bags that name it."""
    filled = int(starts[1]) if len(starts) > 1 else len(order)  # where the empty slots end
    if filled == len(order):
        return bags.new_zeros(len(starts) - 1, bags.shape[1])
    order = order[filled:]
    return functional.embedding_bag(
        order // weights.shape[1],
        bags,
        starts[1:] - filled,
        per_sample_weights=weights.flatten().index_select(0, order),
        mode="sum",
    )


def transposed_sum(weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """[R]: for each row, the sum of the weights [N, K] of the slots that name it."""
    return transposed_gather_sum(weights, order, starts, weights.new_ones(len(weights), 1)).flatten()


class RowSums(NamedTuple):
    """The sums that gradients consist of, as a backend computes them."""

    gather_sum: Callable[[Tensor, Tensor, Tensor], Tensor] = gather_sum
    transpose: Callable[[Tensor, int], Transpose] = transpose
    transposed_gather_sum: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = transposed_gather_sum
    transposed_sum: Callable[[Tensor, Tensor, Tensor], Tensor] = transposed_sum


TORCH = RowSums()


def add_at_(total: Tensor, places: Tensor, values: Tensor) -> Tensor:
    """`total.scatter_add_(0, places, values)`, also on a GPU in a fixed order."""
    if total.is_cuda:
        return total.index_put_((places,), values, accumulate=True)
    return total.scatter_add_(0, places, values)


def add_outer_products_(
    total: Tensor, weights: Tensor, rows: Tensor, values: Tensor, ids: Tensor, scratch_bytes: int
) -> None:
    """Add `scatter(weights).T @ scatter(values)` to total [R, U], one bag after another; as many at a time as their
    pairs of slots fit into the scratch."""
    flat, width = total.view(-1), total.shape[1]
    bag, slot = (rows >= 0).nonzero(as_tuple=True)
    for part in chunks(len(bag), PAIR_BYTES * ids.shape[1], scratch_bytes):
        own, read = (bag[part], slot[part]), ids[bag[part]]
        places = rows[own].long()[:, None] * width + read.clamp_min(0)
        products = weights[own][:, None] * values[bag[part]]
        add_at_(flat, places.flatten(), products.masked_fill_(read < 0, 0).flatten())


def dense(values: Tensor, indices: Tensor, count: int) -> Tensor:
    """[N, count]: sparse rows as a dense matrix. Differentiable; slots that name the same column add up."""
    if count == 0:
        return values[:, :0]
    columns, values = indices.clamp_min(0).long(), values.masked_fill(indices < 0, 0)
    return values.new_zeros(len(values), count).scatter_add(1, columns, values)


def dense_columns(values: Tensor, indices: Tensor, count: int) -> Tensor:
    """[count, N]: `dense(...).T`, written contiguously rather than transposed afterwards. Not differentiable."""
    N = len(values)
    if count == 0:
        return values.new_zeros(0, N)
    places = indices.clamp_min(0).long() * N + torch.arange(N, device=indices.device)[:, None]
    values = values.masked_fill(indices < 0, 0)
    return values.new_zeros(count * N).scatter_add_(0, places.flatten(), values.flatten()).view(count, N)
