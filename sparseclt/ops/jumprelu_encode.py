"""Pre-activations above a threshold of their own for each latent, with a gradient for the threshold."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._encode import linear_chunks
from sparseclt.ops._registration import define, if_needed
from sparseclt.ops._rows import accumulation_dtype
from sparseclt.ops.backend import choose, implementation, register
from sparseclt.ops.batchtopk_encode import fake_slots, slots_of
from sparseclt.ops.checks import check_scratch, check_shapes, check_tensors
from sparseclt.ops.ragged import fill_slots, slot_order
from sparseclt.ops.topk_encode import check_encoder, encode_backward, pre_activations


def jumprelu_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    *,
    bandwidth: float = 1e-3,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """JumpReLU: the latents above their threshold, as padded slots: values [N, S], indices [N, S] int64, l0 [N].

    Equivalent, with `pre = x @ W_enc.T + b_enc`, to `values = pre * (pre > threshold)` and
    `l0 = (pre > threshold).sum(1)`. Rows are in descending order, ties to the lowest index; an empty slot has
    index -1 and value 0. S is the fullest row's length and has no upper bound but F.

    The threshold has the straight-through gradient of Rajamanoharan et al., "Jumping Ahead: Improving
    Reconstruction Fidelity with JumpReLU Sparse Autoencoders" (2024), with a rectangle of width `bandwidth`
    as kernel: where `|pre - threshold| < bandwidth / 2`, d value / d threshold = -threshold / bandwidth and
    d l0 / d threshold = -1 / bandwidth. Latents within the rectangle but below their threshold therefore come
    as slots, too, with value 0: what reads them (`sparse_decode`) gives them the gradient that the threshold
    needs. With `bandwidth=0` there are none, and the threshold has no gradient. x, W_enc and b_enc have that of
    the values above the threshold alone.

    `threshold` [F], above 0. Other arguments and errors as in `topk_encode`.
    """
    check_encoder(x, W_enc, b_enc)
    check_tensors(x=x, threshold=threshold)
    check_shapes(W_enc=(W_enc, "F D"), threshold=(threshold, "F"))
    if not bandwidth >= 0:
        raise ValueError(f"bandwidth: expected a number of at least 0, got {bandwidth}")
    backend = choose("jumprelu_encode", backend, x)
    if backend == "reference":
        return jumprelu_encode_reference(x, W_enc, b_enc, threshold, bandwidth)
    scratch = check_scratch(scratch_bytes, backend)
    values, indices, l0, _ = _jumprelu_encode(x, W_enc, b_enc, threshold, float(bandwidth), scratch, backend)
    return values, indices, l0


def jumprelu_reference(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Dense: values [N, F], active [N, F] as numbers, both with the threshold's gradient, and which are slots."""
    active, step = (pre > threshold).detach(), 1 / bandwidth if bandwidth else 0.0
    within = ((pre - threshold).abs() < bandwidth / 2).detach()
    moved = within * (threshold - threshold.detach()) * step  # worth 0
    nan = pre.isnan()
    values = torch.where(active | nan, pre, 0) - moved * threshold.detach()
    return values, active.to(accumulation_dtype(pre.dtype)) - moved, active | within | nan


def jumprelu_encode_reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, bandwidth: float = 1e-3
) -> tuple[Tensor, Tensor, Tensor]:
    values, active, kept = jumprelu_reference(pre_activations(x, W_enc, b_enc), threshold, bandwidth)
    return *slots_of(values, kept), active.sum(1)


def forward_torch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, bandwidth: float, scratch_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Padded slots [N, S]: values, indices, and which are within the rectangle around their threshold."""
    nothing = torch.empty(0, dtype=torch.int64, device=x.device)
    threshold = threshold.to(accumulation_dtype(x.dtype))
    bound = threshold - bandwidth / 2
    rows, indices, found = [nothing], [nothing], [bound[:0]]
    for part, pre in linear_chunks(x, W_enc, b_enc, scratch_bytes, buffers=2):
        row, latent = (~(pre <= bound)).nonzero().unbind(1)
        rows.append(row + part.start)
        indices.append(latent)
        found.append(pre[row, latent])
    pre, latents = torch.cat(found), torch.cat(indices)
    at = threshold[latents]
    values = pre.masked_fill(pre <= at, 0)
    order, filled = slot_order(torch.cat(rows), values, len(x))
    slots = ((values.to(x.dtype), 0), (latents, -1), (pre - at < bandwidth / 2, 0))
    values, latents, within = (fill_slots(filled, entries[order], empty) for entries, empty in slots)
    return values, latents, within


register("jumprelu_encode", "reference", jumprelu_encode_reference)
register("jumprelu_encode", "torch", forward_torch)


def _run(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    bandwidth: float,
    scratch_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward = implementation("jumprelu_encode", backend).forward
    values, indices, within = forward(x, W_enc, b_enc, threshold, bandwidth, scratch_bytes)
    l0 = (values > 0).sum(1).to(accumulation_dtype(x.dtype))
    return values, indices, l0, within


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, indices = fake_slots(x)
    l0 = x.new_empty(len(x), dtype=accumulation_dtype(x.dtype))
    return values, indices, l0, torch.empty_like(indices, dtype=torch.bool)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, W_enc, _, threshold, ctx.bandwidth, _, ctx.backend = inputs
    values, indices, _, within = output
    ctx.save_for_backward(values, indices, within, x, W_enc, threshold)
    ctx.mark_non_differentiable(indices, within)


def _differentiate(ctx: Any, grad_values: Tensor, _: Tensor, grad_l0: Tensor, __: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, within, x, W_enc, threshold = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    grads = encode_backward(grad_values, values, indices, x, W_enc, needed, ctx.backend)
    d_threshold = None
    if ctx.needs_input_grad[3]:
        # A latent's threshold collects from its slots as its bias does.
        at = threshold.to(grad_l0.dtype)[indices.clamp_min(0)]
        step = 1 / ctx.bandwidth if ctx.bandwidth else 0.0
        grad = (grad_values * at + grad_l0[:, None]) * -step
        only_bias = [False, False, True]
        slots = (grad.to(x.dtype), within.to(x.dtype), indices)
        d_threshold = encode_backward(*slots, x, W_enc, only_bias, ctx.backend)[2]
    return *if_needed(needed, grads), d_threshold, None, None, None


_jumprelu_encode = define(
    "jumprelu_encode(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, float bandwidth, SymInt scratch_bytes,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _run,
    _fake,
    _differentiate,
    _save,
)
