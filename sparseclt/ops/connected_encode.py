"""The whole encoder of sparsely-connected mode: embedding part, upstream part, top-k."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._encode import encode, encoder_gradients
from sparseclt.ops._torch_rows import TORCH, accumulation_dtype, chunks, dense, transpose, transposed_gather_sum
from sparseclt.ops.backend import choose
from sparseclt.ops.checks import check_ids, check_k, check_scratch, check_shapes, check_tensors, check_wide
from sparseclt.ops.connections import Connections, csc
from sparseclt.ops.registration import Implementation, Operator
from sparseclt.ops.topk_encode import select_reference
from sparseclt.ops.virtual_matmul import add_upstream, check_upstream, gather_slots, virtual_matmul_reference


def connected_encode(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor | Connections,
    scale: Tensor,
    k: int,
    *,
    upstream: int | None = None,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents of a module in sparsely-connected mode: values [N, K], descending, and indices [N, K] int64.

    Equivalent to `relu((r0 @ W_enc.T + virtual_matmul(z, V)) / scale[:, None] + b_enc).topk(k)`. Differentiable in
    `r0`, `W_enc`, `b_enc`, `z_values` and `V`; `scale` is a constant. Ties, NaN, half precision and slots without a
    gradient as in `topk_encode`. The [N, F] pre-activations never exist, forward or backward: one chunk of tokens is
    taken after another.

    `r0` [N, D] the residual stream without the latents' part (embedding, written biases); `W_enc` [F, D]; `b_enc` [F]
    or None; `z_values` `z_indices` [N, S], `V` and `connections` [F, C], `upstream` as in `virtual_matmul` (for a
    module without upstream, S = 0 and U = 0); `scale` [N] the frozen scale of the reader's normalisation, above 0.
    `b_enc` and `scale` may be in fp32 beside fp16 and bf16.
    `scratch_bytes` bounds each working buffer in bytes (at least that of one token; None: what suits the backend).
    `backend` as in `topk_encode`.
    Raises ValueError (shapes, k outside 1..F, ids out of range: z_indices are checked on the CPU only, U missing,
    devices, backend), TypeError (dtypes), ImportError (backend not installed).
    """
    check_tensors(r0=r0, W_enc=W_enc, z_values=z_values, V=V)
    check_wide("b_enc", b_enc, "r0", r0)
    check_wide("scale", scale, "r0", r0)
    connections = check_upstream(z_values, z_indices, V, connections, upstream)
    sizes = check_shapes(
        r0=(r0, "N D"),
        W_enc=(W_enc, "F D"),
        b_enc=(b_enc, "F"),
        z_values=(z_values, "N S"),
        V=(V, "F C"),
        scale=(scale, "N"),
    )
    check_k(k, sizes["F"])
    backend = choose("connected_encode", backend, r0)
    if backend == "reference":
        return connected_encode_reference(r0, W_enc, b_enc, z_values, z_indices, V, connections, scale, k)
    order, starts = csc(connections, OPERATOR, backend)
    values, indices = OPERATOR(
        r0, W_enc, b_enc, z_values, z_indices, V, connections.indices, order, starts, connections.upstream, scale, k,
        check_scratch(scratch_bytes, "connected_encode", backend), backend,
    )  # fmt: skip
    return values, indices


def connected_pre_activations(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Connections,
    scale: Tensor,
) -> Tensor:
    """[N, F], for references."""
    pre = r0 @ W_enc.T + virtual_matmul_reference(z_values, z_indices, V, connections)
    pre = pre / scale.detach()[:, None]
    return (pre if b_enc is None else pre + b_enc).to(r0.dtype)


def connected_encode_reference(*inputs: Any) -> tuple[Tensor, Tensor]:
    *tensors, k = inputs
    return select_reference(connected_pre_activations(*tensors), k)


def forward_torch(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    upstream: int,
    scale: Tensor,
    k: int,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    def finish(pre: Tensor, part: slice) -> None:
        add_upstream(pre, z_values[part], z_indices[part], V, connections, upstream, scratch_bytes)
        pre /= scale[part, None]
        if b_enc is not None:
            pre += b_enc

    return encode(r0, W_enc, None, k, "topk", scratch_bytes, finish)


def backward_torch(
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
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of r0, W_enc, b_enc, z_values and V from that of the selected values [N, K]."""
    dtype, wide = V.dtype, accumulation_dtype(V.dtype)
    grad = grad_values.masked_fill(values == 0, 0)
    scaled = (grad / scale[:, None]).to(grad.dtype)
    dr0, dW, db = encoder_gradients(TORCH, grad, scaled, indices, r0, W_enc, needed)
    scaled, z_values, V = scaled.to(wide), z_values.to(wide), V.to(wide)
    dz = z_values.new_zeros(z_values.shape) if needed[3] else None
    dV = V.new_zeros(V.shape) if needed[4] else None
    C = V.shape[1]
    if upstream > 0 and C > 0:
        token_bytes = (2 * upstream + 3 * indices.shape[1] * C) * V.element_size()
        for part in chunks(len(r0), token_bytes, scratch_bytes):
            read = (connections, upstream, indices[part], scaled[part])
            _add_upstream_gradients(dz, dV, *read, z_values[part], z_indices[part], V, part)
    return dr0, dW, db, dz if dz is None else dz.to(dtype), dV if dV is None else dV.to(dtype)


def _add_upstream_gradients(
    dz: Tensor | None,
    dV: Tensor | None,
    connections: Tensor,
    upstream: int,
    selected: Tensor,
    grad: Tensor,
    z_values: Tensor,
    slots: Tensor,
    V: Tensor,
    part: slice,
) -> None:
    """Adds the gradients through the connections of the selected latents only, for a chunk of tokens.

    These are a few thousand pairs per token instead of all F x C, which pays off even at small F.
    """
    n, K = selected.shape
    latents = selected.flatten()  # index_select copies whole rows, several times faster than indexing
    read = connections.index_select(0, latents).view(n, -1)  # [n, K*C] upstream ids
    if dV is not None:
        z = dense(z_values, slots, upstream)
        by_latent = transpose(selected, len(V))
        dV += transposed_gather_sum(grad.reshape(-1, 1), *by_latent, gather_slots(z, read).view(n * K, -1))
    if dz is not None:
        written = (grad[:, :, None] * V.index_select(0, latents).view(n, K, -1)).view(n, -1)
        dz[part] = gather_slots(dense(written, read, upstream), slots)


def fake(r0: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    k = rest[-2]
    return r0.new_empty(len(r0), k), r0.new_empty(len(r0), k, dtype=torch.int64)


def _check_ids(*inputs: Any) -> None:
    check_ids("z_indices", inputs[4], inputs[9], "upstream latents")


def _torch() -> Implementation:
    return Implementation(forward_torch, backward_torch)


def _numba() -> Implementation:
    from sparseclt.ops import _numba as numba

    return Implementation(numba.connected_encode, numba.connected_encode_backward, reads_order=True)


def _triton() -> Implementation:
    from csrc_triton.connected_encode import backward, forward

    return Implementation(forward, backward, reads_order=True)


OPERATOR = Operator(
    "connected_encode(Tensor r0, Tensor W_enc, Tensor? b_enc, Tensor z_values, Tensor z_indices, Tensor V,"
    " Tensor connections, Tensor? order, Tensor? starts, SymInt upstream, Tensor scale, SymInt k,"
    " SymInt scratch_bytes, str backend) -> (Tensor values, Tensor indices)",
    {"torch": _torch, "numba": _numba, "triton": _triton},
    fake,
    check=_check_ids,
    backward="grad_values, values, indices, r0, W_enc, z_values, z_indices, V, connections, order, starts, upstream,"
    " scale, scratch_bytes, needed -> r0, W_enc, b_enc, z_values, V",
    vectors={"b_enc": "W_enc"},
)
