"""The numba backend: CPU tensors, float32 and float64. Imported at first use; needs numba.

Compiled where plain torch falls short: selection (torch's GEMMs fill one tile after another, and each row keeps its k
largest), dot products and sums of gathered rows (virtual weights, decoding, the gradients of values and weights), the
upstream part of pre-activations (a token walks the lists of its active latents) and its gradients, and the order of
weight gradients (a counting sort). Large results lie on huge pages. Ops take torch's function where that is as fast or
faster: `batchtopk_encode`, `jumprelu_encode` and the activation "groupmax".
"""

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from sparseclt.ops import _huge_pages
from sparseclt.ops import _numba_rows as rows
from sparseclt.ops import _numba_select as select
from sparseclt.ops._encode import encode, encoder_gradients, norm_over_heads_
from sparseclt.ops._numba_compile import run
from sparseclt.ops._torch_rows import RowSums, Transpose, chunks


def _ids(indices: Tensor) -> Tensor:
    return indices.to(torch.int64).contiguous()


def _row_dots(bags: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """[N, K]: the dot product of each bag's own vector [N, D] with each row of the table that it names."""
    if len(table) == 0:
        return bags.new_zeros(indices.shape)
    dots = bags.new_empty(indices.shape)
    work = indices.numel() * bags.shape[1]
    run(rows.row_dots, len(bags), work, bags.contiguous(), _ids(indices), table.contiguous(), dots)
    return dots


def gather_sum(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """As in `_torch_rows`. Also the forward pass of `sparse_decode`."""
    out = _huge_pages.empty((len(indices), table.shape[1]), table)
    work = indices.numel() * table.shape[1]
    run(rows.gather_sum, len(out), work, weights.contiguous(), _ids(indices), table.contiguous(), out)
    return out


def transposed_gather_sum(weights: Tensor, order: Tensor, starts: Tensor, bags: Tensor) -> Tensor:
    """As in `_torch_rows`."""
    out = _huge_pages.empty((len(starts) - 1, bags.shape[1]), bags)
    work = order.numel() * bags.shape[1]
    run(rows.transposed_gather_sum, len(out), work, weights.contiguous(), order, starts, bags.contiguous(), out)
    return out


def transpose(indices: Tensor, count: int) -> Transpose:
    """As in `_torch_rows`, by counting."""
    dtype = torch.int32 if max(indices.numel(), count) < torch.iinfo(torch.int32).max else torch.int64
    order, starts = indices.new_empty(indices.numel(), dtype=dtype), indices.new_empty(count + 1, dtype=dtype)
    run(rows.transpose, 1, 0, _ids(indices).flatten(), order, starts)
    return Transpose(order, starts)


def _transposed_sum(weights: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """As in `_torch_rows`."""
    out = weights.new_empty(len(starts) - 1)
    run(rows.transposed_sum, len(out), weights.numel(), weights.contiguous(), order, starts, out)
    return out


def add_outer_products_(
    total: Tensor, weights: Tensor, rows_: Tensor, values: Tensor, ids: Tensor, scratch_bytes: int
) -> None:
    """As in `_torch_rows`, without scratch."""
    read = weights.contiguous(), *transpose(rows_, len(total)), values.contiguous(), ids.contiguous()
    run(rows.add_outer_products, len(total), rows_.numel() * ids.shape[1], *read, total)


SUMS = RowSums(gather_sum, transpose, transposed_gather_sum, _transposed_sum)


def _tiles(tokens: int, columns: int, itemsize: int, scratch_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile of pre-activations, at least those of one token. Four times as wide as high: flatter
    tiles read the weights too often, and in narrower ones a row begins its list with columns that soon leave it."""
    entries = scratch_bytes // itemsize
    if entries < columns:
        return 1, columns
    height = max(1, min(tokens, isqrt(entries // 4)))
    width = min(columns, entries // height)
    if width == columns:
        height = min(tokens, entries // max(1, columns))
    return max(1, height), max(1, width)


class _Selection:
    """The k largest of each row of a product [N, F] that is shown tile by tile."""

    def __init__(self, like: Tensor, N: int, k: int):
        self.values = like.new_empty(N, k)
        self.indices = torch.empty(N, k, dtype=torch.int64)
        self.counts = torch.zeros(N, dtype=torch.int64)

    def of(self, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        return self.values[part], self.indices[part], self.counts[part]

    def finish(self) -> tuple[Tensor, Tensor]:
        run(select.finish, len(self.values), 10 * self.values.numel(), self.values, self.indices, self.counts)
        return self.values, self.indices


def _products(x: Tensor, W: Tensor, scratch_bytes: int) -> Iterator[tuple[slice, int, Tensor]]:
    """`x @ W.T` in tiles: a slice of tokens, the first latent, and the tile, overwritten by the next."""
    height, width = _tiles(len(x), len(W), x.element_size(), scratch_bytes)
    scratch = x.new_empty(height * width)
    for part in chunks(len(x), 1, height):
        n = part.stop - part.start
        for block in chunks(len(W), 1, width):
            w = block.stop - block.start
            tile = scratch[: n * w].view(n, w)
            torch.mm(x[part], W[block].T, out=tile)
            yield part, block.start, tile


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: str, scratch_bytes: int
) -> tuple[Tensor, Tensor]:
    if activation == "groupmax":
        return encode(x, W_enc, b_enc, k, activation, scratch_bytes)
    best = _Selection(x, len(x), k)
    bias, absolute = _bias(W_enc, b_enc), activation == "abstopk"
    for part, offset, tile in _products(x, W_enc, scratch_bytes):
        run(select.take_encoded, len(tile), tile.numel(), tile, offset, bias, absolute, *best.of(part))
    return best.finish()


def _bias(W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    return W_enc.new_zeros(len(W_enc)) if b_enc is None else b_enc.contiguous()


def sparse_decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    grad, (order, starts) = grad.contiguous(), transpose(indices, len(W_dec))
    d_values = _transposed_row_dots(grad, order, starts, indices, W_dec) if needed[0] else None
    return d_values, transposed_gather_sum(values, order, starts, grad) if needed[1] else None


def row_dots(bags: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """As in `_torch_rows`. Reads each row of the table once, in order: `table` is larger than the caches."""
    return _transposed_row_dots(bags, *transpose(indices, len(table)), indices, table)


def _transposed_row_dots(bags: Tensor, order: Tensor, starts: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    dots, bags = bags.new_zeros(indices.shape), bags.contiguous()
    read = bags, order, starts, indices.shape[1], table.contiguous()
    run(rows.transposed_row_dots, len(table), indices.numel() * bags.shape[1], *read, dots)
    return dots


def virtual_weights(W_enc: Tensor, E: Tensor, connections: Tensor) -> Tensor:
    return _row_dots(W_enc, connections, E)


def _by_upstream(V: Tensor, order: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Virtual weights and their downstream latents in the order of upstream latents, [F*C] each, and `starts`."""
    if V.numel() == 0:
        return V.new_empty(0), order, starts
    return V.flatten().index_select(0, order), order // V.shape[1], starts


def virtual_matmul(
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    upstream: int,
    scratch_bytes: int,
) -> Tensor:
    pre = V.new_empty(len(z_values), len(V))
    by_upstream = _by_upstream(V, order, starts)
    work = pre.numel() + z_values.numel() * V.numel() // max(1, upstream)
    run(rows.upstream_part, len(pre), work, z_values.contiguous(), _ids(z_indices), *by_upstream, pre)
    return pre


def virtual_matmul_backward(
    grad: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    upstream: int,
    scratch_bytes: int,
    needed: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    by_upstream = weights, *_ = _by_upstream(V, order, starts)
    dz, dweights = torch.zeros_like(z_values, memory_format=torch.contiguous_format), torch.zeros_like(weights)
    z = z_values.contiguous(), _ids(z_indices)
    work = z_values.numel() * V.numel() // max(1, upstream)
    run(rows.upstream_gradients, upstream, work, grad.contiguous(), *z, *by_upstream, dz, dweights)
    dV = None
    if needed[1]:
        dV = V.new_empty(V.shape)
        dV.view(-1).scatter_(0, order.long(), dweights)
    return dz, dV


def connected_encode(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    upstream: int,
    scale: Tensor,
    k: int,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    best = _Selection(r0, len(r0), k)
    by_upstream = _by_upstream(V, order, starts)
    z_values, z_indices, scale = z_values.contiguous(), _ids(z_indices), scale.contiguous()
    bias, cursors = _bias(W_enc, b_enc), torch.zeros(z_indices.shape, dtype=torch.int64)
    for part, offset, tile in _products(r0, W_enc, scratch_bytes):
        z = z_values[part], z_indices[part]
        work = 2 * tile.numel()
        run(select.add_upstream, len(tile), work, tile, offset, *z, *by_upstream, cursors[part], scale[part])
        run(select.take_encoded, len(tile), work, tile, offset, bias, False, *best.of(part))
    return best.finish()


def connected_encode_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    r0: Tensor,
    W_enc: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor,
    starts: Tensor,
    upstream: int,
    scale: Tensor,
    scratch_bytes: int,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    grad = grad_values.masked_fill(values == 0, 0)
    scaled = (grad / scale[:, None]).contiguous()
    gradients = encoder_gradients(SUMS, grad, scaled, indices, r0, W_enc, needed)
    z_indices, connections, V = _ids(z_indices), _ids(connections), V.contiguous()
    work = indices.numel() * V.shape[1]
    dz = dV = None
    if needed[3]:
        dz = z_values.new_empty(z_values.shape)
        read = scaled, indices, z_indices, connections, V, upstream
        run(rows.selected_value_gradients, len(dz), work, *read, dz)
    if needed[4]:
        dV = V.new_zeros(V.shape)
        read = scaled, indices, z_values.contiguous(), z_indices, connections, upstream
        run(rows.selected_weight_gradients, len(dV), work, *read, dV)
    return *gradients, dz, dV


def select_connections(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int) -> Tensor:
    best, importance = _Selection(E, W_enc.shape[1], C), importance.expand(W_enc.shape[1], len(E))
    # The heads' tiles come in step.
    heads = [_products(head, E, scratch_bytes // len(W_enc)) for head in W_enc]
    for tiles in zip(*heads, strict=True):
        part, offset, _ = tiles[0]
        scores = norm_over_heads_(tile for _, _, tile in tiles)
        scores *= importance[part, offset : offset + scores.shape[1]]
        run(select.take_scored, len(scores), scores.numel(), scores, offset, *best.of(part))
    return best.finish()[1]
