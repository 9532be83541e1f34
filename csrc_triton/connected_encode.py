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
from torch.nn import functional

from .add_upstream import add_upstream, out_lists
from .launch import LaunchConfig, cdiv, check_range, launcher, pow2, spans
from .rows import transposed_gather_sum
from .scores import LOWEST, encoder_scores, float_key
from .stream import streamed_topk
from .topk_encode import check_encoder, encoder_gradients
from .transpose import Transpose, transpose


@dataclass(frozen=True)
class Lookup(LaunchConfig):
    """How many connections of a latent find their slots at a time."""

    block: int = 64

    @property
    def constexprs(self) -> dict[str, int]:
        return {"BLOCK": self.block}


def lookup_config(C: int) -> Lookup:
    block = pow2(C, 32, 128)
    return Lookup(num_warps=block // 32, block=block)


@dataclass(frozen=True)
class MaximaTile(LaunchConfig):
    """A tile of scores whose group maxima are taken."""

    rows: int = 16
    columns: int = 512

    @property
    def constexprs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns}


MAXIMA = MaximaTile(num_warps=8)
LAST = 2**31 - 1  # an id above all upstream latents
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
    dz,  # [N, S] fp32, zeros, in the order of `ids` (HAS_DZ)
    read,  # [N, K*C] fp32, zeros (HAS_READ)
    grad,  # [N, K] fp32
    slots,  # [N, K] selected latents, -1 where inactive
    ids,  # [N, 2^STEPS] int32: upstream latents of a token's S slots, ascending, and at least one LAST
    z,  # [N, S] fp32: their values
    V,  # [F, C]
    connections,  # [F, C]
    K, C, S,
    grad_n, grad_k, slots_n, slots_k, V_f, V_c, connections_f, connections_c,
    HAS_DZ: tl.constexpr,
    HAS_READ: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: the upstream values that the connections of its selected latents read, and what these connections add
    to the gradient of the slots that they read.

    A connection finds its slot by a binary search. Those of one latent read different slots: no two lanes write to the
    same one.
    """
    n = tl.program_id(0).to(tl.int64)
    dz += n * S
    ids += n << STEPS
    z += n * S
    read += n * K * C
    for k in range(0, K):
        i = tl.load(slots + n * slots_n + k * slots_k).to(tl.int64)
        if i >= 0:
            g = tl.load(grad + n * grad_n + k * grad_k)
            for first in range(0, C, BLOCK):
                c = first + tl.arange(0, BLOCK)
                u = tl.load(connections + i * connections_f + c * connections_c, mask=c < C, other=-1).to(tl.int32)
                weight = tl.load(V + i * V_f + c * V_c, mask=c < C, other=0).to(tl.float32) * g
                before = tl.zeros((BLOCK,), tl.int32)  # ids below u
                half = 1 << (STEPS - 1)
                for _ in range(STEPS):
                    further = before + half
                    before = tl.where(tl.load(ids + further - 1) < u, further, before)
                    half = half >> 1
                found = (tl.load(ids + before) == u) & (u >= 0)
                value = tl.zeros((BLOCK,), tl.float32)
                while tl.max(found.to(tl.int32), axis=0) > 0:  # again where a latent is in two slots of the token
                    value += tl.load(z + before, mask=found, other=0)
                    if HAS_DZ:
                        tl.store(dz + before, tl.load(dz + before, mask=found, other=0) + weight, mask=found)
                    before += 1
                    found = found & (tl.load(ids + before, mask=found, other=-1) == u)
                if HAS_READ:
                    tl.store(read + k * C + c, value, mask=c < C)
            tl.debug_barrier()  # the next latent may add to a slot that another thread wrote


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

    Only active slots and kept connections carry gradient. `order`, `starts` and `scratch_bytes` are not read:
    READ_BYTES bounds the upstream values read for dV. Other arguments as in `forward`.
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
        _upstream_gradients(dz, dV, scaled, slots, V, connections, z_values, z_indices, by_latent)
    return *gradients, dz, dV


def _upstream_gradients(
    dz: Tensor | None,
    dV: Tensor | None,
    grad: Tensor,
    slots: Tensor,
    V: Tensor,
    connections: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    by_latent: Transpose | None,
) -> None:
    """Fills dz [N, S] and dV [F, C]. The values that tokens read are written out for a block of tokens, then summed by
    latent like any gradient."""
    (N, K), S, C = slots.shape, z_values.shape[1], V.shape[1]
    lookup, steps = lookup_config(C), S.bit_length()
    size = N if dV is None else min(N, max(1, READ_BYTES // (4 * K * C)))
    total: Tensor | None = None
    for tokens in spans(N, size):
        part, g = slots[tokens], grad[tokens]
        ids, order = functional.pad(z_indices[tokens].to(torch.int32), (0, (1 << steps) - S), value=LAST).sort(
            stable=True
        )
        order = order[:, :S]
        sums = g.new_zeros(len(part), S if dz is not None else 0)
        read = g.new_zeros(len(part) * K, C if dV is not None else 0)
        d_upstream_kernel[(len(part),)](
            sums, read, g, part, ids, z_values[tokens].float().gather(1, order), V, connections, K, C, S,
            *g.stride(), *part.stride(), *V.stride(), *connections.stride(),
            HAS_DZ=dz is not None, HAS_READ=dV is not None, STEPS=steps,
            **lookup.constexprs, **lookup.options,
        )  # fmt: skip
        if dz is not None:
            dz[tokens] = torch.zeros_like(sums).scatter_(1, order, sums)
        if dV is not None:
            of_part = by_latent if by_latent is not None and size == N else transpose(part, len(dV))
            added = transposed_gather_sum(g.reshape(-1, 1), *of_part, read)
            total = added if total is None else total.add_(added)
    if dV is not None and total is not None:
        dV.copy_(total)
