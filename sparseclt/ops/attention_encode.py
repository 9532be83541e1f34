"""The encoder of an attention module in sparsely-connected mode: the heads' OV circuits under the frozen pattern.

    pre[q] = b_enc + W_enc bias
             + sum_h sum_k A[h,q,k] / scale[k] * (W_enc OV_h^T base[k] + sum_c V_h[i,c] z[k, conn[i,c]])

`base` is the embedding with the biases already written; the pattern A mixes all of it, at the key's scale. `x` is what
attention writes for `base`, its `bias` included, and `mix` is A over the scale. The [N, H, F] tensor never exists: a
bounded number of sequences is taken at a time, head after head. The backward pass computes no pre-activation again: the
gradients of the selected latents, mixed back to the keys, walk the same connections.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._encode import top_k
from sparseclt.ops._torch_rows import chunks
from sparseclt.ops.backend import choose
from sparseclt.ops.checks import (
    check_device,
    check_ids,
    check_indices,
    check_k,
    check_scratch,
    check_shapes,
    check_tensors,
)
from sparseclt.ops.connections import Connections, as_connections, csc
from sparseclt.ops.registration import Implementation, Operator
from sparseclt.ops.scratch import default_scratch
from sparseclt.ops.sparse_decode import OPERATOR as SPARSE_DECODE
from sparseclt.ops.topk_encode import OPERATOR as TOPK_ENCODE
from sparseclt.ops.topk_encode import select_reference
from sparseclt.ops.virtual_matmul import OPERATOR as VIRTUAL_MATMUL
from sparseclt.ops.virtual_matmul import virtual_matmul_reference


def attention_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor | Connections,
    mix: Tensor,
    k: int,
    *,
    upstream: int | None = None,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents of an attention module in sparsely-connected mode: values [B, S, K], descending, and indices [B, S, K]
    int64, for B sequences of S tokens.

    Equivalent to `relu(x @ W_enc.T + b_enc + sum_h mix[:, h] @ virtual_matmul(z, V[h])).topk(k)`. Differentiable in
    `x`, `W_enc`, `b_enc`, `z_values` and `V`; `mix` is a constant. Ties, NaN and slots without a gradient as in
    `topk_encode`; pre-activations are added up in the dtype of the inputs.

    `x` [B, S, D] what attention writes for the embedding and the biases; `W_enc` [F, D]; `b_enc` [F] or None;
    `z_values` `z_indices` [B, S, A] the A active upstream latents of each token, ids as in `virtual_matmul`; `V`
    [H, F, C] virtual weights through each head; `connections` [F, C] and `upstream` as in `virtual_matmul`, shared by
    the heads; `mix` [B, H, S, S] the frozen attention pattern over the key's normalisation scale. `scratch_bytes`
    bounds the pre-activations that are alive at a time (at least those of one sequence; None: 16 MiB). `backend` as in
    `topk_encode`.
    Raises ValueError (shapes, k outside 1..F, ids out of range: z_indices are checked on the CPU only, U missing,
    devices, backend), TypeError (dtypes), ImportError (backend not installed).
    """
    check_tensors(x=x, W_enc=W_enc, b_enc=b_enc, z_values=z_values, V=V, mix=mix)
    check_indices("z_indices", z_indices)
    connections = as_connections(connections, upstream)
    sizes = check_shapes(
        x=(x, "B S D"),
        W_enc=(W_enc, "F D"),
        b_enc=(b_enc, "F"),
        z_values=(z_values, "B S A"),
        z_indices=(z_indices, "B S A"),
        V=(V, "H F C"),
        connections=(connections.indices, "F C"),
        mix=(mix, "B H S S"),
    )
    check_device("z_indices", z_indices, "x", x)
    check_device("connections", connections.indices, "x", x)
    check_k(k, sizes["F"])
    backend = choose("attention_encode", backend, x)
    if backend == "reference":
        return attention_encode_reference(x, W_enc, b_enc, z_values, z_indices, V, connections, mix, k)
    order, starts = csc(connections, OPERATOR, backend, z_values)
    values, indices = OPERATOR(
        x, W_enc, b_enc, z_values, z_indices, V, connections.indices, order, starts, connections.upstream, mix, k,
        check_scratch(scratch_bytes, "attention_encode", backend), backend,
    )  # fmt: skip
    return values, indices


def attention_pre_activations(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Connections,
    mix: Tensor,
) -> Tensor:
    """[B, S, F], for references."""
    pre = x @ W_enc.T if b_enc is None else x @ W_enc.T + b_enc
    mix = mix.detach()
    for head, weights in enumerate(V):
        z = z_values.flatten(0, 1), z_indices.flatten(0, 1)
        written = virtual_matmul_reference(*z, weights, connections)
        pre = pre + mix[:, head] @ written.view_as(pre)
    return pre


def attention_encode_reference(*inputs: Any) -> tuple[Tensor, Tensor]:
    *tensors, k = inputs
    pre = attention_pre_activations(*tensors)
    values, indices = select_reference(pre.flatten(0, 1), k)
    return values.unflatten(0, pre.shape[:2]), indices.unflatten(0, pre.shape[:2])


def _sequences(mix: Tensor, F: int, scratch_bytes: int) -> Iterator[slice]:
    """Slices of the B sequences, at least one each: two buffers [b, S, F] fit into the scratch."""
    return chunks(len(mix), 2 * mix.shape[-1] * F * mix.element_size(), scratch_bytes)


def forward_by(
    virtual_matmul: Callable[..., Tensor],
    walk_bytes: int,
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    upstream: int,
    mix: Tensor,
    k: int,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    """By a backend's `virtual_matmul`, whose own scratch is `walk_bytes`."""
    (B, S, _), F = x.shape, len(W_enc)
    values, indices = x.new_empty(B, S, k), torch.empty(B, S, k, dtype=torch.int64, device=x.device)
    scratch = x.new_empty(0)
    for part in _sequences(mix, F, scratch_bytes):
        z = z_values[part].flatten(0, 1), z_indices[part].flatten(0, 1)
        if part.start == 0:
            scratch = x.new_empty(len(z[0]), F)
        rows, flat = x[part].flatten(0, 1), scratch[: len(z[0])]
        if b_enc is None:
            torch.mm(rows, W_enc.T, out=flat)
        else:
            torch.addmm(b_enc, rows, W_enc.T, out=flat)
        pre = flat.view(-1, S, F)
        for head, weights in enumerate(V):
            written = virtual_matmul(*z, weights, connections, order, starts, upstream, walk_bytes)
            pre.baddbmm_(mix[part, head], written.view(-1, S, F))
        top = top_k(flat.relu_(), k)
        values[part], indices[part] = (t.view(-1, S, k) for t in top)
    return values, indices


def backward_by(
    encode_backward: Callable[..., tuple[Tensor | None, ...]],
    decode_backward: Callable[..., tuple[Tensor | None, ...]],
    matmul_backward: Callable[..., tuple[Tensor | None, ...]],
    walk_bytes: int,
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    x: Tensor,
    W_enc: Tensor,
    z_values: Tensor,
    z_indices: Tensor,
    V: Tensor,
    connections: Tensor,
    order: Tensor | None,
    starts: Tensor | None,
    upstream: int,
    mix: Tensor,
    scratch_bytes: int,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x, W_enc, b_enc, z_values and V by a backend's backward passes of three other ops."""
    tokens = (t.flatten(0, 1) for t in (grad_values, values, indices, x))
    dx, dW, db = encode_backward(*tokens, W_enc, needed[:3])
    dz, dV = (
        torch.zeros_like(tensor, memory_format=torch.contiguous_format) if wanted else None
        for tensor, wanted in zip((z_values, V), needed[3:], strict=True)
    )
    grad = grad_values.masked_fill(values == 0, 0)
    for part in _sequences(mix, len(W_enc), scratch_bytes) if any(needed[3:]) else ():
        z = z_values[part].flatten(0, 1), z_indices[part].flatten(0, 1)
        selected = _by_latent(grad[part], indices[part], len(W_enc))
        for head, weights in enumerate(V):
            at_keys = _mix_to_keys(decode_backward, mix[part, head], *selected, len(W_enc))
            read = *z, weights, connections, order, starts, upstream, walk_bytes
            dz_part, dV_part = matmul_backward(at_keys, *read, needed[3:])
            if dz is not None and dz_part is not None:
                dz[part] += dz_part.view_as(dz[part])
            if dV is not None and dV_part is not None:
                dV[head] += dV_part
    return dx if dx is None else dx.view_as(x), dW, db, dz, dV


def _by_latent(grad: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Gradients and ids [b*S, K] of the selected latents [b, S, K], numbered apart for each of b sequences."""
    b, _, K = grad.shape
    rows = indices + F * torch.arange(b, device=grad.device)[:, None, None]
    return grad.reshape(-1, K), rows.view(-1, K)


def _mix_to_keys(
    decode_backward: Callable[..., tuple[Tensor | None, ...]], mix: Tensor, grad: Tensor, rows: Tensor, F: int
) -> Tensor:
    """[b*S, F]: for each key and latent, the pattern's entries [b, S, S] of the queries that selected the latent, times
    their gradients. It is the weight gradient of a decoder with one row for each latent of each sequence."""
    b, S, _ = mix.shape
    decoder = grad.new_empty(()).expand(b * F, S)  # only its shape is read
    _, at_keys = decode_backward(mix.reshape(-1, S), grad, rows, decoder, [False, True])
    assert at_keys is not None
    return at_keys.view(b, F, S).mT.reshape(-1, F)


def fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = *x.shape[:2], rest[-2]
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int64)


def _check_ids(*inputs: Any) -> None:
    check_ids("z_indices", inputs[4], inputs[9], "upstream latents")


def _composed(backend: str) -> Implementation:
    """From other ops of the backend."""
    matmul, walk_bytes = VIRTUAL_MATMUL.implementation(backend), default_scratch("virtual_matmul", backend)
    encode, decode = TOPK_ENCODE.implementation(backend), SPARSE_DECODE.implementation(backend)
    backward = partial(backward_by, encode.gradients, decode.gradients, matmul.gradients, walk_bytes)
    return Implementation(partial(forward_by, matmul.forward, walk_bytes), backward, matmul.reads_order)


OPERATOR = Operator(
    "attention_encode(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor z_values, Tensor z_indices, Tensor V,"
    " Tensor connections, Tensor? order, Tensor? starts, SymInt upstream, Tensor mix, SymInt k,"
    " SymInt scratch_bytes, str backend) -> (Tensor values, Tensor indices)",
    {backend: partial(_composed, backend) for backend in ("torch", "numba", "triton")},
    fake,
    check=_check_ids,
    backward="grad_values, values, indices, x, W_enc, z_values, z_indices, V, connections, order, starts, upstream,"
    " mix, scratch_bytes, needed -> x, W_enc, b_enc, z_values, V",
    vectors={"b_enc": "W_enc"},
)
