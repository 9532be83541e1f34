"""The N x k largest pre-activations of a batch: tokens share the budget of active latents."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._encode import encode_backward, linear_chunks
from sparseclt.ops._torch_rows import TORCH, accumulation_dtype
from sparseclt.ops.backend import choose
from sparseclt.ops.checks import check_k, check_scratch
from sparseclt.ops.ragged import fill_slots, slot_order
from sparseclt.ops.registration import Implementation, Operator
from sparseclt.ops.topk_encode import check_encoder, pre_activations, topk_encode


def batchtopk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    slots: int | None = None,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """BatchTopK: the N * k largest positive pre-activations of a batch of N tokens, as padded slots.

    Equivalent to `relu(x @ W_enc.T + b_enc).flatten().topk(N * k)`, without zeros, sorted into rows: values [N, S]
    descending and indices [N, S] int64, -1 (value 0) in empty slots. S is the length of the longest row, at most F.
    Ties go to the lowest token, then to the lowest index.

    Differentiable in `x`, `W_enc` and `b_enc` through the kept values only: the threshold that they imply has no
    gradient. After training, a fixed threshold usually takes its place: see `jumprelu_encode`. Source: Bussmann,
    Leask, Nanda, "BatchTopK Sparse Autoencoders" (2024).

    `slots`: S, fixed, from 1 to F. Then the N * k are chosen among the `slots` largest of each token, which is the same
    unless a token has more; nothing waits for the device, and CUDA graphs can hold the op.
    `(indices >= 0).all(1).sum()` counts, on the device, the tokens that use all their slots and may lack some.

    Other arguments and errors as in `topk_encode`. `scratch_bytes` bounds the pre-activations that are alive at a time;
    up to 3 N k candidates are kept beside them.
    """
    check_encoder(x, W_enc, b_enc, k)
    if slots is not None:
        check_k(slots, len(W_enc), "slots")
        values, indices = topk_encode(x, W_enc, b_enc, slots, backend=backend, scratch_bytes=scratch_bytes)
        candidates = values.detach().flatten()
        kept = (among_largest(candidates, len(x) * k) & (candidates != 0)).view_as(values)
        return values.masked_fill(~kept, 0), indices.masked_fill(~kept, -1)
    backend = choose("batchtopk_encode", backend, x)
    if backend == "reference":
        return batchtopk_encode_reference(x, W_enc, b_enc, k)
    scratch = check_scratch(scratch_bytes, "batchtopk_encode", backend)
    values, indices = OPERATOR(x, W_enc, b_enc, k, scratch, backend)
    return values, indices


def batchtopk_encode_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    dense = pre_activations(x, W_enc, b_enc).relu()
    kept = torch.zeros_like(dense, dtype=torch.bool).flatten()
    kept[dense.flatten().sort(descending=True, stable=True).indices[: len(x) * k]] = True
    kept = kept.view_as(dense) & (dense != 0)
    return slots_of(dense, kept)


def slots_of(dense: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The kept entries of `dense` [N, F] as padded slots, each row in descending order. Differentiable."""
    S = int(kept.sum(1).max()) if len(kept) else 0
    order = dense.detach().masked_fill(~kept, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :S]
    filled = kept.gather(1, order)
    return dense.gather(1, order).masked_fill(~filled, 0), order.masked_fill(~filled, -1)


def among_largest(candidates: Tensor, limit: int) -> Tensor:
    """Boolean [M]: which are the `limit` largest of `candidates` [M]; ties to the first, NaN largest. Waits for no
    device."""
    if len(candidates) <= limit:
        return torch.ones_like(candidates, dtype=torch.bool)
    # topk is exact in values but free to choose among equals: of those equal to the last value, take the first.
    last = candidates.topk(limit).values[-1]
    better = (candidates > last) | (candidates.isnan() & ~last.isnan())
    equal = (candidates == last) | (candidates.isnan() & last.isnan())
    return better | (equal & (equal.cumsum(0) <= limit - better.sum()))


def largest(candidates: Tensor, limit: int) -> Tensor:
    """Their positions, ascending."""
    return among_largest(candidates, limit).nonzero().flatten()


def forward_torch(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int) -> tuple[Tensor, Tensor]:
    """Collects candidates in order of token and latent. Whenever there are more than 2 N k, those that can no longer be
    among the N k largest are dropped, which also raises the bar for later chunks."""
    N, F = len(x), len(W_enc)
    limit, bar = N * k, 0.0
    places = torch.empty(0, dtype=torch.int64, device=x.device)
    found = torch.empty(0, dtype=accumulation_dtype(x.dtype), device=x.device)
    for part, pre in linear_chunks(x, W_enc, b_enc, scratch_bytes, buffers=3):
        pre = pre.flatten()
        new = (~(pre <= bar)).nonzero().flatten()
        places, found = torch.cat([places, new + part.start * F]), torch.cat([found, pre[new]])
        if len(found) > 2 * limit or part.stop == N:
            best = largest(found, limit)
            places, found = places[best], found[best]
            if len(found) == limit:
                bar = float(found.min().nan_to_num(0.0))
    order, filled = slot_order(places // F, found, N)
    return fill_slots(filled, found[order].to(x.dtype), 0), fill_slots(filled, places[order] % F, -1)


def fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    S = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(len(x), S), x.new_empty(len(x), S, dtype=torch.int64)


def _torch() -> Implementation:
    return Implementation(forward_torch, partial(encode_backward, TORCH))


def _numba() -> Implementation:
    from sparseclt.ops._numba import SUMS

    # Compiled selection would be no faster here.
    return Implementation(forward_torch, partial(encode_backward, SUMS))


def _triton() -> Implementation:
    from csrc_triton.batchtopk_encode import forward
    from csrc_triton.topk_encode import backward

    return Implementation(forward, backward)


OPERATOR = Operator(
    "batchtopk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k, SymInt scratch_bytes, str backend)"
    " -> (Tensor values, Tensor indices)",
    {"torch": _torch, "numba": _numba, "triton": _triton},
    fake,
    backward="grad_values, values, indices, x, W_enc, needed -> x, W_enc, b_enc",
    vectors={"b_enc": "W_enc"},
)
