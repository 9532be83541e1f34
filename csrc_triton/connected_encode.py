"""The whole encode of sparsely-connected mode: embedding part, upstream part, top-k; and its masked gradients.

forward:  pre[n, i] = <r0[n], W_enc[i]> / scale[n] + b_enc[i] + sum_c V[i, c] z[n, connections[i, c]] / scale[n],
          one block of tokens at a time; relu of the k largest
backward: only a token's active slots and their kept connections count:
          dV[i, c] = sum over the tokens that selected i of g z[n, connections[i, c]] / scale[n]
          dz[n, s] = sum over the selected i, and the c that read the latent of slot s, of g V[i, c] / scale[n]

The product is encoder_scores (scores.py), the pairs are those of add_upstream.py, the selection that of topk_encode
(stream.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_upstream import OutLists, add_upstream, added_up, block_of_pairs, out_lists, search_steps, token_pairs
from .launch import LaunchConfig, cdiv, check_range, launcher, spans
from .rows import transposed_gather_sum
from .scores import LOWEST, encoder_scores, float_key
from .stream import streamed_topk
from .topk_encode import check_encoder, encoder_gradients
from .transpose import Transpose, transpose


@dataclass(frozen=True)
class Match(LaunchConfig):
    """How many pairs are compared at a time with how many selected latents."""

    block: int = 64
    selected: int = 64

    @property
    def constexprs(self) -> dict[str, int]:
        return {"BLOCK": self.block, "SELECTED": self.selected}


@dataclass(frozen=True)
class MaximaTile(LaunchConfig):
    """A tile of scores whose group maxima are taken."""

    rows: int = 16
    columns: int = 512

    @property
    def constexprs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns}


MATCH = Match(num_warps=2)
MAXIMA = MaximaTile(num_warps=8)
READ_BYTES = 512 << 20  # upstream values read for dV at a time. Fixed: blocks of tokens decide how dV is rounded.


@triton.jit
def maxima_kernel(
    scores,  # [n, F] fp32
    maxima,  # [n, ceil(F / GROUP)] int32 keys, out
    n, F,
    scores_row, maxima_row,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Keys of the group maxima of a tile of scores, as `encoder_scores` writes them without an upstream part."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    valid = (rows < n) & (columns < F)
    key = float_key(tl.load(scores + rows * scores_row + columns, mask=valid, other=0.0), False)
    key = tl.where(valid, key, LOWEST)
    largest = tl.max(tl.reshape(key, (ROWS, COLUMNS // GROUP, GROUP)), axis=2)
    groups = tl.program_id(1) * (COLUMNS // GROUP) + tl.arange(0, COLUMNS // GROUP)[None, :]
    tl.store(maxima + rows * maxima_row + groups, largest, mask=(rows < n) & (groups < tl.cdiv(F, GROUP)))


@launcher
def forward(
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
    """Values [N, k] in descending order, indices [N, k] int64; ties go to the lowest index.

    Equivalent to `relu(pre).topk(k)` with the `pre` above. `r0` [N, D], `W_enc` [F, D], `b_enc` [F], `z_values` and
    `z_indices` [N, S], `V` and `connections` [F, C], `scale` [N], and U, the number of `upstream` latents; `order` and
    `starts`: `transpose(connections, U)`. `scratch_bytes` bounds working memory (at least one token's).
    """
    check_encoder(r0, W_enc, b_enc, k)
    N, F = len(r0), len(W_enc)
    check_range("z_indices", z_indices, upstream)
    values = torch.empty(N, k, dtype=r0.dtype, device=r0.device)
    indices = torch.empty(N, k, dtype=torch.int64, device=r0.device)
    lists = None if 0 in (z_values.shape[1], upstream, V.numel()) else out_lists(V, order, starts)
    # Scaling the few upstream values saves another pass over all pre-activations.
    z = z_values.float() / scale.float()[:, None]

    def fill(rows: slice, columns: slice, scores: Tensor, maxima: Tensor | None, group: int) -> None:
        if lists is None:
            encoder_scores(r0[rows], W_enc, b_enc, scale[rows], scores, maxima, group)
            return
        encoder_scores(r0[rows], W_enc, b_enc, scale[rows], scores, None, 1)
        add_upstream(scores, z[rows], z_indices[rows], lists, upstream)
        if maxima is not None:
            _group_maxima(scores, maxima, group)

    # The pairs of a token meet latents all over its row, hence whole rows.
    slot_bytes = 0 if lists is None else z_values.shape[1] * (4 + lists.starts.element_size())
    streamed_topk(
        fill, N, F, k, scratch_bytes, values, indices, relu=True, whole_rows=True, row_bytes=slot_bytes
    )  # fmt: skip
    return values, indices


def _group_maxima(scores: Tensor, maxima: Tensor, group: int) -> None:
    """Writes the group maxima of `scores` [n, F] to `maxima`, now that the upstream part is in them."""
    n, F = scores.shape
    maxima_kernel[cdiv(n, MAXIMA.rows), cdiv(F, MAXIMA.columns)](
        scores, maxima, n, F, scores.stride(0), maxima.stride(0), GROUP=group, **MAXIMA.constexprs, **MAXIMA.options
    )


@triton.jit
def d_upstream_kernel(
    dz,  # [N, S] fp32, zeros (HAS_DZ)
    read,  # [N, K*C] fp32, zeros (HAS_READ)
    grad,  # [N, K] fp32
    slots,  # [N, K] selected latents, -1 where inactive
    z_values,  # [N, S]
    ends,  # [N, S]
    shifts,  # [N, S]
    weights,  # [F*C]
    targets,  # [F*C]
    order,  # [F*C]
    K, C, S,
    grad_n, grad_k, slots_n, slots_k, value_n, value_s,
    HAS_DZ: tl.constexpr,
    HAS_READ: tl.constexpr,
    STEPS: tl.constexpr,
    SELECTED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The pairs of a token whose downstream latent it selected: what they add to the gradient of their upstream slot,
    and the upstream values that the connections of selected latents read.

    Pairs are few (S C F / U), and each is compared with the K selected latents only.
    """
    n = tl.program_id(0).to(tl.int64)
    ends += n * S
    shifts += n * S
    grad += n * grad_n
    slots += n * slots_n
    place = tl.arange(0, SELECTED)
    chosen = tl.load(slots + place.to(tl.int64) * slots_k, mask=place < K, other=-1).to(tl.int32)
    count = tl.load(ends + S - 1)
    for first in range(0, count, BLOCK):
        slot, entry, used = block_of_pairs(ends, shifts, first, count, S, STEPS, BLOCK)
        i = tl.load(targets + entry, mask=used, other=-2).to(tl.int32)
        number = tl.max(tl.where(i[None, :] == chosen[:, None], place[:, None] + 1, 0), axis=0)
        for start in range(SELECTED, K, SELECTED):
            later = start + place
            others = tl.load(slots + later.to(tl.int64) * slots_k, mask=later < K, other=-1).to(tl.int32)
            more = tl.where(i[None, :] == others[:, None], later[:, None] + 1, 0)
            number = tl.maximum(number, tl.max(more, axis=0))
        if tl.max(number, axis=0) > 0:
            hit = number > 0
            k = (number - 1).to(tl.int64)
            if HAS_DZ:
                part = tl.load(weights + entry, mask=hit, other=0).to(tl.float32)
                part *= tl.load(grad + k * grad_k, mask=hit, other=0)
                sums, writes = added_up(slot, part, hit)
                at_slot = dz + n * S + slot
                tl.store(at_slot, tl.load(at_slot, mask=writes, other=0) + sums, mask=writes)
            if HAS_READ:
                position = tl.load(order + entry, mask=hit, other=0).to(tl.int64)
                value = tl.load(z_values + n * value_n + slot.to(tl.int64) * value_s, mask=hit, other=0)
                at = (k * C + position % C).to(tl.int32)
                # A latent that is in two slots of the token meets the same connection twice.
                sums, writes = added_up(at, value.to(tl.float32), hit)
                at_read = read + n * (K * C) + at
                tl.store(at_read, tl.load(at_read, mask=writes, other=0) + sums, mask=writes)
            tl.debug_barrier()


@launcher
def backward(
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
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dr0 [N, D], dW [F, D], db [F], dz [N, S] and dV [F, C] from `grad_values` [N, K]; None where not `needed`.

    Only active slots and kept connections carry gradient. `scratch_bytes` is not read: READ_BYTES bounds the upstream
    values read for dV. Other arguments as in `forward`.
    """
    active = values != 0  # a NaN slot is active: its gradient is not dropped
    grad = torch.where(active, grad_values, 0)
    slots = indices.masked_fill(~active, -1)
    scaled = grad.float() / scale.float()[:, None]
    by_latent = transpose(slots, len(W_enc)) if needed[1] or needed[2] else None
    gradients = encoder_gradients(grad, scaled, slots, r0, W_enc, needed[:3], by_latent)
    dz = torch.zeros_like(z_values) if needed[3] else None
    dV = torch.zeros_like(V) if needed[4] else None
    if (needed[3] or needed[4]) and 0 not in (slots.numel(), z_values.numel(), V.numel()):
        lists = out_lists(V, order, starts)
        _upstream_gradients(dz, dV, scaled, slots, lists, order, z_values, z_indices, upstream, by_latent)
    return *gradients, dz, dV


def _upstream_gradients(
    dz: Tensor | None,
    dV: Tensor | None,
    grad: Tensor,
    slots: Tensor,
    lists: OutLists,
    order: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    upstream: int,
    by_latent: Transpose | None,
) -> None:
    """Fills dz [N, S] and dV [F, C]. The values that tokens read are written out for a block of tokens, then summed by
    latent like any gradient."""
    (N, K), S = slots.shape, z_values.shape[1]
    C = 0 if dV is None else dV.shape[1]
    size = N if dV is None else min(N, max(1, READ_BYTES // (4 * K * C)))
    total: Tensor | None = None
    for tokens in spans(N, size):
        part, g, z, ids = slots[tokens], grad[tokens], z_values[tokens], z_indices[tokens]
        sums = g.new_zeros(len(part), S if dz is not None else 0)
        read = g.new_zeros(len(part) * K, C)
        d_upstream_kernel[(len(part),)](
            sums, read, g, part, z, *token_pairs(ids, lists, upstream), lists.weights, lists.targets, order, K, C, S,
            *g.stride(), *part.stride(), *z.stride(),
            HAS_DZ=dz is not None, HAS_READ=dV is not None, STEPS=search_steps(S),
            **MATCH.constexprs, **MATCH.options,
        )  # fmt: skip
        if dz is not None:
            dz[tokens] = sums
        if dV is not None:
            of_part = by_latent if by_latent is not None and size == N else transpose(part, len(dV))
            added = transposed_gather_sum(g.reshape(-1, 1), *of_part, read)
            total = added if total is None else total.add_(added)
    if dV is not None and total is not None:
        dV.copy_(total)
