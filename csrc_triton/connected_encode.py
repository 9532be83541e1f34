"""The whole encode of sparsely-connected mode: embedding part, upstream part, top-k; and its masked gradients.

forward:  pre[n, i] = <r0[n], W_enc[i]> / scale[n] + b_enc[i] + sum_c V[i, c] z[n, connections[i, c]] / scale[n],
          one block of tokens at a time; relu of the k largest
backward: only a token's active slots and their kept connections are read:
          dV[i, c] = sum over the tokens that selected i of g z[n, connections[i, c]] / scale[n]
          dz[n, s] = sum over the selected i, and the c that read the latent of slot s, of g V[i, c] / scale[n]

The product is encoder_scores (scores.py), the walk add_upstream, the selection that of topk_encode (stream.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_upstream import add_upstream, out_lists
from .launch import LaunchConfig, cdiv, check_range, launcher, spans
from .rows import transposed_gather_sum
from .scores import LOWEST, encoder_scores, float_key
from .stream import streamed_topk
from .topk_encode import check_encoder, encoder_gradients
from .transpose import transpose


@dataclass(frozen=True)
class Match(LaunchConfig):
    """How many reads (connections of selected latents) and upstream slots of a token are compared at a time."""

    reads: int = 64
    slots: int = 64

    @property
    def constexprs(self) -> dict[str, int]:
        return {"READS": self.reads, "SLOTS": self.slots}


@dataclass(frozen=True)
class MaximaTile(LaunchConfig):
    """A tile of scores whose group maxima are taken."""

    rows: int = 16
    columns: int = 512

    @property
    def constexprs(self) -> dict[str, int]:
        return {"ROWS": self.rows, "COLUMNS": self.columns}


MATCH = Match(num_warps=8, reads=64, slots=64)
MAXIMA = MaximaTile(num_warps=8)


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

    def fill(rows: slice, columns: slice, scores: Tensor, maxima: Tensor | None, group: int) -> None:
        if lists is None:
            encoder_scores(r0[rows], W_enc, b_enc, scale[rows], scores, maxima, group)
            return
        encoder_scores(r0[rows], W_enc, b_enc, scale[rows], scores, None, 1)
        # Scaling the few upstream values saves another pass over all pre-activations.
        z = z_values[rows].float() / scale[rows, None].float()
        add_upstream(scores, z, z_indices[rows], lists, upstream, "copy", scratch_bytes)
        if maxima is not None:
            _group_maxima(scores, maxima, group)

    # The walk of an upstream latent meets latents all over a row, hence whole rows.
    streamed_topk(fill, N, F, k, scratch_bytes, values, indices, relu=True, whole_rows=True)
    return values, indices


def _group_maxima(scores: Tensor, maxima: Tensor, group: int) -> None:
    """Writes the group maxima of `scores` [n, F] to `maxima`, now that the upstream part is in them."""
    n, F = scores.shape
    maxima_kernel[cdiv(n, MAXIMA.rows), cdiv(F, MAXIMA.columns)](
        scores, maxima, n, F, scores.stride(0), maxima.stride(0), GROUP=group, **MAXIMA.constexprs, **MAXIMA.options
    )


@triton.jit
def _read(
    slots, connections, n, reads, K, C,
    slots_n, slots_k, connections_f, connections_c,
):  # fmt: skip
    """The selected latent and the upstream latent of each of `reads`, the token's K*C connections; -1: none."""
    there = reads < K * C
    latent = tl.load(slots + n * slots_n + (reads // C) * slots_k, mask=there, other=-1).to(tl.int64)
    place = connections + latent * connections_f + (reads % C).to(tl.int64) * connections_c
    upstream = tl.load(place, mask=latent >= 0, other=-1).to(tl.int64)
    return latent, upstream


@triton.jit
def read_kernel(
    out,  # [N, K*C] fp32
    slots,  # [N, K] selected latents, -1 where inactive
    connections,  # [F, C]
    z_values,  # [N, S]
    z_indices,  # [N, S]
    K, C, S,
    slots_n, slots_k, connections_f, connections_c, value_n, value_s, index_n, index_s,
    READS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """The upstream values that the connections of a token's selected latents read, found by comparing all ids.

    The K x C x S comparisons stay in registers; a dense row of z would be U wide.
    """
    n = tl.program_id(0).to(tl.int64)
    reads = tl.program_id(1) * READS + tl.arange(0, READS)
    _latent, upstream = _read(slots, connections, n, reads, K, C, slots_n, slots_k, connections_f, connections_c)
    sums = tl.zeros((READS, SLOTS), tl.float32)
    for start in range(0, S, SLOTS):
        s = start + tl.arange(0, SLOTS).to(tl.int64)
        id = tl.load(z_indices + n * index_n + s * index_s, mask=s < S, other=-1).to(tl.int64)
        value = tl.load(z_values + n * value_n + s * value_s, mask=id >= 0, other=0.0).to(tl.float32)
        same = (upstream[:, None] == id[None, :]) & (id >= 0)[None, :]
        sums += tl.where(same, value[None, :], 0.0)
    tl.store(out + n * (K * C) + reads, tl.sum(sums, axis=1), mask=reads < K * C)


@triton.jit
def d_upstream_kernel(
    dz,  # [N, S] out
    grad,  # [N, K] fp32
    slots,  # [N, K] selected latents, -1 where inactive
    connections,  # [F, C]
    V,  # [F, C]
    z_indices,  # [N, S]
    K, C, S,
    dz_n, dz_s, grad_n, grad_k, slots_n, slots_k, connections_f, connections_c, V_f, V_c, index_n, index_s,
    READS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """SLOTS upstream slots of a token; each adds up the connections of the selected latents that read it."""
    n = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1).to(tl.int64) * SLOTS + tl.arange(0, SLOTS)
    id = tl.load(z_indices + n * index_n + s * index_s, mask=s < S, other=-1).to(tl.int64)
    sums = tl.zeros((READS, SLOTS), tl.float32)
    for start in range(0, K * C, READS):
        reads = start + tl.arange(0, READS)
        latent, upstream = _read(slots, connections, n, reads, K, C, slots_n, slots_k, connections_f, connections_c)
        used = upstream >= 0
        weight = tl.load(V + latent * V_f + (reads % C).to(tl.int64) * V_c, mask=used, other=0.0).to(tl.float32)
        weight *= tl.load(grad + n * grad_n + (reads // C) * grad_k, mask=used, other=0.0)
        same = (upstream[:, None] == id[None, :]) & used[:, None]
        sums += tl.where(same, weight[:, None], 0.0)
    tl.store(dz + n * dz_n + s * dz_s, tl.sum(sums, axis=0).to(dz.dtype.element_ty), mask=s < S)


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
    order: Tensor | None,
    starts: Tensor | None,
    upstream: int,
    scale: Tensor,
    scratch_bytes: int,
    needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """dr0 [N, D], dW [F, D], db [F], dz [N, S] and dV [F, C] from `grad_values` [N, K]; None where not `needed`.

    Only active slots and kept connections carry gradient. `order` and `starts` are not read. `scratch_bytes` bounds
    the upstream values read for dV. Other arguments as in `forward`.
    """
    active = values != 0  # a NaN slot is active: its gradient is not dropped
    grad = torch.where(active, grad_values, 0)
    slots = indices.masked_fill(~active, -1)
    scaled = grad.float() / scale.float()[:, None]
    gradients = encoder_gradients(grad, scaled, slots, r0, W_enc, needed[:3])
    connected = 0 not in (slots.numel(), z_values.numel(), V.numel())
    dz = dV = None
    if needed[3]:
        dz = torch.zeros_like(z_values)
        if connected:
            _d_upstream(dz, scaled, slots, connections, V, z_indices)
    if needed[4]:
        dV = torch.zeros_like(V)
        if connected:
            dV.copy_(_d_virtual(scaled, slots, connections, z_values, z_indices, len(V), scratch_bytes))
    return *gradients, dz, dV


def _d_upstream(dz: Tensor, grad: Tensor, slots: Tensor, connections: Tensor, V: Tensor, z_indices: Tensor) -> None:
    (N, K), C, S = slots.shape, connections.shape[1], dz.shape[1]
    d_upstream_kernel[N, cdiv(S, MATCH.slots)](
        dz, grad, slots, connections, V, z_indices, K, C, S,
        *dz.stride(), *grad.stride(), *slots.stride(), *connections.stride(), *V.stride(), *z_indices.stride(),
        **MATCH.constexprs, **MATCH.options,
    )  # fmt: skip


def _d_virtual(
    grad: Tensor,
    slots: Tensor,
    connections: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    F: int,
    scratch_bytes: int,
) -> Tensor:
    """dV in fp32: the values read by a block of tokens are written out, then summed by latent like any gradient."""
    (N, K), C, S = slots.shape, connections.shape[1], z_values.shape[1]
    size = min(N, max(1, scratch_bytes // (4 * K * C)))
    scratch = torch.empty(size * K * C, dtype=torch.float32, device=grad.device)
    dV: Tensor | None = None
    for tokens in spans(N, size):
        part, z, ids = slots[tokens], z_values[tokens], z_indices[tokens]
        read = scratch[: len(part) * K * C]
        read_kernel[len(part), cdiv(K * C, MATCH.reads)](
            read, part, connections, z, ids, K, C, S,
            *part.stride(), *connections.stride(), *z.stride(), *ids.stride(),
            **MATCH.constexprs, **MATCH.options,
        )  # fmt: skip
        by_latent = transpose(part, F)
        sums = transposed_gather_sum(grad[tokens].reshape(-1, 1), *by_latent, read.view(-1, C))
        dV = sums if dV is None else dV.add_(sums)
    assert dV is not None, "called without tokens"
    return dV
