"""The N x k largest pre-activations of a batch: tokens share the budget of active latents."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._encode import linear_chunks
from sparseclt.ops._registration import define, if_needed
from sparseclt.ops._rows import accumulation_dtype
from sparseclt.ops.backend import choose, implementation, register
from sparseclt.ops.checks import check_scratch
from sparseclt.ops.ragged import fill_slots, slot_order
from sparseclt.ops.topk_encode import check_encoder, encode_backward, pre_activations


def batchtopk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """BatchTopK: the N * k largest positive pre-activations of all N tokens, as padded slots.

    Equivalent to `relu(x @ W_enc.T + b_enc).flatten().topk(N * k)`, without zeros, sorted into rows: values
    [N, S] descending, indices [N, S] int64, -1 (value 0) in empty slots. S is the fullest row's length and has
    no upper bound but F. Ties go to the lowest token, then the lowest index. The gradient is that of the kept
    values alone: the threshold that they imply has none. After training, a fixed threshold is usual: see
    `jumprelu_encode`. Source: Bussmann, Leask, Nanda, "BatchTopK Sparse Autoencoders" (2024).

    Arguments and errors as in `topk_encode`; `scratch_bytes` bounds the pre-activations alive at a time, beside
    which up to 3 N k candidates are kept.
    """
    check_encoder(x, W_enc, b_enc, k)
    backend = choose("batchtopk_encode", backend, x)
    if backend == "reference":
        return batchtopk_encode_reference(x, W_enc, b_enc, k)
    values, indices = _batchtopk_encode(x, W_enc, b_enc, k, check_scratch(scratch_bytes, backend), backend)
    return values, indices


def batchtopk_encode_reference(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    dense = pre_activations(x, W_enc, b_enc).relu()
    kept = torch.zeros_like(dense, dtype=torch.bool).flatten()
    kept[dense.flatten().sort(descending=True, stable=True).indices[: len(x) * k]] = True
    kept = kept.view_as(dense) & (dense != 0)
    return slots_of(dense, kept)


def slots_of(dense: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The kept entries of [N, F] as padded slots, each row in descending order. Differentiable."""
    S = int(kept.sum(1).max()) if len(kept) else 0
    order = dense.detach().masked_fill(~kept, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :S]
    filled = kept.gather(1, order)
    return dense.gather(1, order).masked_fill(~filled, 0), order.masked_fill(~filled, -1)


def largest(candidates: Tensor, limit: int) -> Tensor:
    """Positions, rising, of the `limit` largest of `candidates` [M]; ties to the first, NaN largest."""
    if len(candidates) <= limit:
        return torch.arange(len(candidates), device=candidates.device)
    # topk is exact in values; among equals its choice is free, so the last value is taken in order of position.
    last = candidates.topk(limit).values[-1]
    better = (candidates > last) | (candidates.isnan() & ~last.isnan())
    equal = (candidates == last) | (candidates.isnan() & last.isnan())
    return (better | (equal & (equal.cumsum(0) <= limit - better.sum()))).nonzero().flatten()


def forward_torch(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int) -> tuple[Tensor, Tensor]:
    """Candidates in order of token and latent; what cannot be among the N k largest any more is dropped whenever
    there are more than 2 N k, which also raises the bar for later chunks."""
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


register("batchtopk_encode", "reference", batchtopk_encode_reference)
register("batchtopk_encode", "torch", forward_torch)


def _run(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scratch_bytes: int, backend: str
) -> tuple[Tensor, Tensor]:
    return implementation("batchtopk_encode", backend).forward(x, W_enc, b_enc, k, scratch_bytes)


def fake_slots(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    S = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(len(x), S), x.new_empty(len(x), S, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, *_, ctx.backend = inputs
    ctx.save_for_backward(*output, x, W_enc)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    grads = encode_backward(grad_values, *ctx.saved_tensors, needed, ctx.backend)
    return *if_needed(needed, grads), None, None, None


_batchtopk_encode = define(
    "batchtopk_encode(Tensor x, Tensor W_enc, Tensor? b_enc, SymInt k, SymInt scratch_bytes, str backend)"
    " -> (Tensor, Tensor)",
    _run,
    fake_slots,
    _differentiate,
    _save,
)
