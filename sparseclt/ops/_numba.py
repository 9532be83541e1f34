"""The numba backend: CPU tensors, float32 and float64. Imported when first asked for; needs numba.

Compiled where plain torch falls short: selection (GEMMs by torch fill one tile after another, and each row keeps its
k largest), dot products and sums of gathered rows (virtual weights, decoding, the gradients of values and weights),
what upstream latents add (a token walks the lists of its active ones) with its gradients, and the order of weight
gradients (a counting sort). Large results lie on huge pages. Where torch is as fast or faster, its function is
registered: `batchtopk_encode`, `jumprelu_encode` and the activation "groupmax".
"""

from collections.abc import Iterator
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from sparseclt.ops import _huge_pages
from sparseclt.ops import _numba_rows as rows
from sparseclt.ops import _numba_select as select
from sparseclt.ops._encode import encoder_gradients
from sparseclt.ops._numba_compile import run
from sparseclt.ops._rows import RowSums, Transpose, chunks
from sparseclt.ops.backend import implementation, register
from sparseclt.ops.select_connections import norm_over_heads_
from sparseclt.ops.topk_encode import encode_backward_by, topk_encode_torch
from sparseclt.ops.virtual_matmul import Upstream
from sparseclt.ops.virtual_weights import backward_by as virtual_weights_backward_by


def _ids(indices: Tensor) -> Tensor:
    return indices.to(torch.int64).contiguous()


def _row_dots(bags: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """[N, K]: the dot product of each bag's own vector [N, D] with each of the table's rows that it names."""
    if len(table) == 0:
        return bags.new_zeros(indices.shape)
    dots = bags.new_empty(indices.shape)
    work = indices.numel() * bags.shape[1]
    run(rows.row_dots, len(bags), work, bags.contiguous(), _ids(indices), table.contiguous(), dots)
    return dots


def _gather_sum(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """As `_rows.gather_sum`."""
    out = _huge_pages.empty((len(indices), table.shape[1]), table)
    work = indices.numel() * table.shape[1]
    run(rows.gather_sum, len(out), work, weights.contiguous(), _ids(indices), table.contiguous(), out)
    return out


def _transposed_gather_sum(weights: Tensor, transposed: Transpose, bags: Tensor) -> Tensor:
    """As `_rows.transposed_gather_sum`."""
    out = _huge_pages.empty((len(transposed.starts) - 1, bags.shape[1]), bags)
    work = transposed.order.numel() * bags.shape[1]
    run(rows.transposed_gather_sum, len(out), work, weights.contiguous(), *transposed, bags.contiguous(), out)
    return out


def _transpose(indices: Tensor, count: int) -> Transpose:
    """As `_rows.transpose`, by counting."""
    dtype = torch.int32 if max(indices.numel(), count) < torch.iinfo(torch.int32).max else torch.int64
    order, starts = indices.new_empty(indices.numel(), dtype=dtype), indices.new_empty(count + 1, dtype=dtype)
    run(rows.transpose, 1, 0, _ids(indices).flatten(), order, starts)
    return Transpose(order, starts)


def _transposed_sum(weights: Tensor, transposed: Transpose) -> Tensor:
    """As `_rows.transposed_sum`."""
    out = weights.new_empty(len(transposed.starts) - 1)
    run(rows.transposed_sum, len(out), weights.numel(), weights.contiguous(), *transposed, out)
    return out


_SUMS = RowSums(_gather_sum, _transpose, _transposed_gather_sum, _transposed_sum)


# Encoders


def _tiles(tokens: int, columns: int, itemsize: int, scratch_bytes: int) -> tuple[int, int]:
    """Rows and columns of a tile of pre-activations, about square: flat ones read the weights too often. One token's
    at least."""
    entries = scratch_bytes // itemsize
    if entries < columns:
        return 1, columns
    height = max(1, min(tokens, isqrt(entries)))
    width = min(columns, entries // height)
    if width == columns:
        height = min(tokens, entries // max(1, columns))
    return max(1, height), max(1, width)


class _Selection:
    """The k largest of each row of a product [N, F] that is shown a tile at a time."""

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


def _topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: str, scratch_bytes: int
) -> tuple[Tensor, Tensor]:
    if activation == "groupmax":
        return topk_encode_torch(x, W_enc, b_enc, k, activation, scratch_bytes)
    best = _Selection(x, len(x), k)
    bias, absolute = _bias(W_enc, b_enc), activation == "abstopk"
    for part, offset, tile in _products(x, W_enc, scratch_bytes):
        run(select.take_encoded, len(tile), tile.numel(), tile, offset, bias, absolute, *best.of(part))
    return best.finish()


def _bias(W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    return W_enc.new_zeros(len(W_enc)) if b_enc is None else b_enc.contiguous()


# Decoder


def _sparse_decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    order, d_values = _transpose(indices, len(W_dec)), None
    if needed[0]:
        d_values, grad = grad.new_zeros(values.shape), grad.contiguous()
        read = grad, *order, values.shape[1], W_dec.contiguous()
        run(rows.transposed_row_dots, len(W_dec), values.numel() * grad.shape[1], *read, d_values)
    return d_values, _transposed_gather_sum(values, order, grad) if needed[1] else None


# Virtual weights


def _virtual_weights(W_enc: Tensor, E: Tensor, connections: Tensor) -> Tensor:
    return _row_dots(W_enc, connections, E)


def _by_upstream(upstream: Upstream) -> tuple[Tensor, Tensor, Tensor]:
    """Virtual weights and their downstream latents in the order of upstream latents, [F*C] each, and `starts`."""
    V, (order, starts) = upstream.V, upstream.csc
    if V.numel() == 0:
        return V.new_empty(0), order, starts
    return V.flatten().index_select(0, order), order // V.shape[1], starts


def _virtual_matmul(upstream: Upstream, scratch_bytes: int) -> Tensor:
    z_values, z_indices, V, _, _, _, U = upstream
    pre = V.new_empty(len(z_values), len(V))
    by_upstream = _by_upstream(upstream)
    work = pre.numel() + z_values.numel() * V.numel() // max(1, U)
    run(rows.upstream_part, len(pre), work, z_values.contiguous(), _ids(z_indices), *by_upstream, pre)
    return pre


def _virtual_matmul_backward(
    grad: Tensor, upstream: Upstream, scratch_bytes: int, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    z_values, z_indices, V, _, _, _, U = upstream
    by_upstream = weights, *_ = _by_upstream(upstream)
    dz, dweights = torch.zeros_like(z_values, memory_format=torch.contiguous_format), torch.zeros_like(weights)
    z = z_values.contiguous(), _ids(z_indices)
    work = z_values.numel() * V.numel() // max(1, U)
    run(rows.upstream_gradients, U, work, grad.contiguous(), *z, *by_upstream, dz, dweights)
    dV = None
    if needed[1]:
        dV = V.new_empty(V.shape)
        dV.view(-1).scatter_(0, upstream.csc.order.long(), dweights)
    return dz, dV


# Sparsely-connected mode


def _connected_encode(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    scale: Tensor,
    upstream: Upstream,
    k: int,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    z_values, z_indices, *_ = upstream
    best = _Selection(r0, len(r0), k)
    by_upstream = _by_upstream(upstream)
    z_values, z_indices, scale = z_values.contiguous(), _ids(z_indices), scale.contiguous()
    bias, cursors = _bias(W_enc, b_enc), torch.zeros(z_indices.shape, dtype=torch.int64)
    for part, offset, tile in _products(r0, W_enc, scratch_bytes):
        z = z_values[part], z_indices[part]
        work = 2 * tile.numel()
        run(select.add_upstream, len(tile), work, tile, offset, *z, *by_upstream, cursors[part], scale[part])
        run(select.take_encoded, len(tile), work, tile, offset, bias, False, *best.of(part))
    return best.finish()


def _connected_encode_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    r0: Tensor,
    W_enc: Tensor,
    scale: Tensor,
    upstream: Upstream,
    scratch_bytes: int,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    z_values, z_indices, V, connections, _, _, U = upstream
    grad = grad_values.masked_fill(values == 0, 0)
    scaled = (grad / scale[:, None]).contiguous()
    gradients = encoder_gradients(grad, scaled, indices, r0, W_enc, needed, _SUMS)
    z_indices, connections, V = _ids(z_indices), _ids(connections), V.contiguous()
    work = indices.numel() * V.shape[1]
    dz = dV = None
    if needed[3]:
        dz = z_values.new_empty(z_values.shape)
        read = scaled, indices, z_indices, connections, V, U
        run(rows.selected_value_gradients, len(dz), work, *read, dz)
    if needed[4]:
        dV = V.new_zeros(V.shape)
        read = scaled, indices, z_values.contiguous(), z_indices, connections, U
        run(rows.selected_weight_gradients, len(dV), work, *read, dV)
    return *gradients, dz, dV


def _select_connections(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int) -> Tensor:
    best, importance = _Selection(E, W_enc.shape[1], C), importance.expand(W_enc.shape[1], len(E))
    # Tiles of all heads come in step.
    heads = [_products(head, E, scratch_bytes // len(W_enc)) for head in W_enc]
    for tiles in zip(*heads, strict=True):
        part, offset, _ = tiles[0]
        scores = norm_over_heads_(tile for _, _, tile in tiles)
        scores *= importance[part, offset : offset + scores.shape[1]]
        run(select.take_scored, len(scores), scores.numel(), scores, offset, *best.of(part))
    return best.finish()[1]


register("topk_encode", "numba", _topk_encode, partial(encode_backward_by, _SUMS))
for _op in ("batchtopk_encode", "jumprelu_encode"):
    register(_op, "numba", implementation(_op, "torch").forward)
register("sparse_decode", "numba", _gather_sum, _sparse_decode_backward)
register("transposed_gather_sum", "numba", _transposed_gather_sum)
register("virtual_weights", "numba", _virtual_weights, partial(virtual_weights_backward_by, _SUMS))
register("virtual_matmul", "numba", _virtual_matmul, _virtual_matmul_backward, csc=True)
register("connected_encode", "numba", _connected_encode, _connected_encode_backward, csc=True)
register("select_connections", "numba", _select_connections)
