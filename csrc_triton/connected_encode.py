"""The whole encode of sparsely-connected mode: embedding part, upstream part, top-k; and its masked gradients.

forward:  pre[n, i] = <r0[n], W_enc[i]> / scale[n] + b_enc[i] + sum_c V[i, c] z[n, connections[i, c]] / scale[n]
          for a block of tokens at a time; the k largest, relu
backward: only the active slots of a token and their kept connections are read:
          dV[i, c] = sum over the tokens that selected i of g z[n, connections[i, c]] / scale[n]
          dz[n, s] = sum over the selected i, and the c that read the latent of slot s, of g V[i, c] / scale[n]
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import select
from .launch import AheadOfTime, LaunchConfig, ahead_of_time_case, cdiv, check_range, launcher
from .rows import transposed_gather_sum
from .scores import ahead_of_time_encoder, ahead_of_time_maxima, encoder_scores, group_maxima
from .stream import SCRATCH_BYTES, spans, streamed_topk
from .topk_encode import check_encoder, encoder_gradients
from .transpose import transpose
from .virtual_matmul import add_upstream, out_lists


@dataclass(frozen=True)
class Match(LaunchConfig):
    """Connections and upstream slots of a token that are compared at a time."""

    reads: int = 64
    slots: int = 64

    @property
    def constexprs(self) -> dict[str, int]:
        return {"READS": self.reads, "SLOTS": self.slots}


MATCH = Match(num_warps=8, reads=64, slots=64)


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
    scale: Tensor,
    k: int,
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    """Values [N, k] in descending order, indices [N, k] int64; ties go to the lowest index.

    `r0` [N, D], `W_enc` [F, D], `b_enc` [F], `z_values` `z_indices` [N, S], `V` `connections` [F, C], `scale` [N];
    `order` and `starts`: `transpose(connections, U)`. `scratch_bytes` bounds working memory (one token's at least).
    """
    check_encoder(r0, W_enc, b_enc, k)
    N, F, S, U = len(r0), len(W_enc), z_values.shape[1], len(starts) - 1
    check_range("z_indices", z_indices, U)
    values = torch.empty(N, k, dtype=r0.dtype, device=r0.device)
    indices = torch.empty(N, k, dtype=torch.int64, device=r0.device)
    connected = S > 0 and U > 0 and V.numel() > 0
    lists = out_lists(V, order, starts) if connected else None

    def fill(rows: slice, columns: slice, scores: Tensor, maxima: Tensor | None, group: int) -> None:
        if not connected:
            encoder_scores(r0[rows], W_enc, b_enc, scale[rows], scores, maxima, group)
            return
        encoder_scores(r0[rows], W_enc, b_enc, scale[rows], scores, None, 1)
        # Scaling the few upstream values saves another pass over all pre-activations.
        z = z_values[rows].float() / scale[rows, None].float()
        add_upstream(scores, z, z_indices[rows], V, order, starts, lists=lists)
        if maxima is not None:
            group_maxima(scores, maxima, group)

    # Upstream latents write to all of F, hence whole rows.
    streamed_topk(fill, N, F, k, scratch_bytes, values, indices, relu=True, whole_rows=True)
    return values, indices


@triton.jit
def _read(
    slots,
    connections,
    n,
    reads,
    K,
    C,
    slots_n,
    slots_k,
    connections_f,
    connections_c,
):
    """Selected latent and upstream latent of `reads`, numbered through a token's selected latents; -1: none."""
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
    K,
    C,
    S,
    slots_n,
    slots_k,
    connections_f,
    connections_c,
    value_n,
    value_s,
    index_n,
    index_s,
    READS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """What the connections of the selected latents read from a token's upstream latents: by comparing all ids.

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
    K,
    C,
    S,
    dz_n,
    dz_s,
    grad_n,
    grad_k,
    slots_n,
    slots_k,
    connections_f,
    connections_c,
    V_f,
    V_c,
    index_n,
    index_s,
    READS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Some upstream slots of a token: each adds up the connections of the selected latents that read it."""
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
    scale: Tensor,
    needs: tuple[bool, bool, bool, bool, bool] = (True, True, True, True, True),
    scratch_bytes: int = SCRATCH_BYTES,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dr0, dW, db, dz [N, S] and dV [F, C], those that `needs` asks for: active slots and kept connections alone."""
    active = values != 0  # a NaN slot is active: its gradient is not dropped
    grad = torch.where(active, grad_values, 0)
    slots = indices.masked_fill(~active, -1)
    scaled = grad.float() / scale.float()[:, None]
    gradients = encoder_gradients(grad, scaled, slots, r0, W_enc, needs[:3])
    connected = 0 not in (slots.numel(), z_values.numel(), V.numel())
    dz = dV = None
    if needs[3]:
        dz = torch.zeros_like(z_values)
        if connected:
            _d_upstream(dz, scaled, slots, connections, V, z_indices)
    if needs[4]:
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
    """dV in fp32: what was read is written out for a block of tokens, then summed by latent as any gradient is."""
    (N, K), C, S = slots.shape, connections.shape[1], z_values.shape[1]
    size = min(N, max(1, scratch_bytes // (4 * K * C)))
    scratch = torch.empty(size * K * C, dtype=torch.float32, device=grad.device)
    dV = None
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
    return dV


def ahead_of_time() -> list[AheadOfTime]:
    kernels = ahead_of_time_encoder(HAS_SCALE=True) + ahead_of_time_maxima() + select.ahead_of_time()
    for dtype in ("fp32", "bf16"):
        types = {"out": "*fp32:16", "grad": "*fp32:16", "slots": "*i64:16", "connections": "*i64:16"}
        types |= {"z_indices": "*i64:16", "z_values": f"*{dtype}:16", "V": f"*{dtype}:16", "dz": f"*{dtype}:16"}
        for kernel in (read_kernel, d_upstream_kernel):
            steps = {n: 1 for n in kernel.arg_names if n.endswith(("_k", "_c", "_s"))}
            constexprs = steps | MATCH.constexprs
            name = f"connected {kernel.__name__.removesuffix('_kernel')} {dtype}"
            kernels.append(ahead_of_time_case(name, kernel, types, constexprs, MATCH.options))
    return kernels
