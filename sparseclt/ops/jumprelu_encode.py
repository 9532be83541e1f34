"""Pre-activations above a threshold per latent, with a gradient for the threshold."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._encode import encode_backward, linear_chunks
from sparseclt.ops._torch_rows import TORCH, accumulation_dtype
from sparseclt.ops.backend import choose
from sparseclt.ops.batchtopk_encode import fake as fake_slots
from sparseclt.ops.batchtopk_encode import slots_of
from sparseclt.ops.checks import check_k, check_scratch, check_shapes, check_tensors
from sparseclt.ops.jumprelu_slots import floor, jump_relu_slots, raised
from sparseclt.ops.ragged import fill_slots, slot_order
from sparseclt.ops.registration import Implementation, Operator
from sparseclt.ops.topk_encode import check_encoder, pre_activations, topk_encode


def jumprelu_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    *,
    bandwidth: float = 1e-3,
    slots: int | None = None,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """JumpReLU: the latents above their threshold, as padded slots: values [N, S], indices [N, S] int64, l0 [N].

    Equivalent, with `pre = x @ W_enc.T + b_enc`, to `values = pre * (pre > threshold)` and
    `l0 = (pre > threshold).sum(1)`. Rows are in descending order, ties to the lowest index; an empty slot has
    index -1 and value 0. S is the length of the longest row, at most F. `l0` is float32 or wider.

    The threshold has the straight-through gradient of Rajamanoharan et al., "Jumping Ahead: Improving Reconstruction
    Fidelity with JumpReLU Sparse Autoencoders" (2024), with a rectangle of width `bandwidth` as its kernel: where
    `|pre - threshold| < bandwidth / 2`, d value / d threshold = -threshold / bandwidth and
    d l0 / d threshold = -1 / bandwidth. Latents within the rectangle but below their threshold therefore get a slot,
    too, with value 0: an op that reads them (`sparse_decode`) gives them the gradient that the threshold needs. With
    `bandwidth=0` there are none, and the threshold has no gradient. `x`, `W_enc` and `b_enc` have a gradient through
    the values above the threshold only.

    `slots`: S, fixed, from 1 to F. Then each token has the `slots` latents that are highest above their rectangle's
    lower end, which are all of them unless it has more, or negative ones within a rectangle. They come in the order of
    that height, with empty slots between them, and their pre-activations are rounded once more. Nothing waits for the
    device, and CUDA graphs can hold the op. `(indices >= 0).all(1).sum()` counts, on the device, the tokens that use
    all their slots and may lack some.

    `threshold` [F], above 0, and `bandwidth` are in units of the pre-activations. Other arguments and errors as in
    `topk_encode`; also ValueError for a negative `bandwidth`.
    """
    check_encoder(x, W_enc, b_enc)
    check_tensors(x=x, threshold=threshold)
    check_shapes(W_enc=(W_enc, "F D"), threshold=(threshold, "F"))
    if not bandwidth >= 0:
        raise ValueError(f"bandwidth: expected a number of at least 0, got {bandwidth}")
    if slots is not None:
        check_k(slots, len(W_enc), "slots")
        return _in_slots(x, W_enc, b_enc, threshold, bandwidth, slots, backend, scratch_bytes)
    backend = choose("jumprelu_encode", backend, x)
    if backend == "reference":
        return jumprelu_encode_reference(x, W_enc, b_enc, threshold, bandwidth)
    scratch = check_scratch(scratch_bytes, "jumprelu_encode", backend)
    values, indices, l0, _ = OPERATOR(x, W_enc, b_enc, threshold, float(bandwidth), scratch, backend)
    return values, indices, l0


def _in_slots(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor,
    bandwidth: float,
    slots: int,
    backend: str | None,
    scratch_bytes: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    bias = x.new_zeros(len(W_enc)) if b_enc is None else b_enc
    least, lowered = floor(threshold, bandwidth, bias)
    lowered = lowered + (bias - bias.detach())  # of its value, with the gradient of the bias
    values, indices = topk_encode(x, W_enc, lowered, slots, backend=backend, scratch_bytes=scratch_bytes)
    return jump_relu_slots(raised(values, indices, least), indices, threshold, bandwidth)


def jumprelu_reference(pre: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor, Tensor]:
    """Dense: values [N, F] and active [N, F] as numbers, both with the threshold's gradient, and which have a slot."""
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
    """Padded slots [N, S]: values, indices, and which of them lie within the rectangle around their threshold."""
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
    values, latents, near = (fill_slots(filled, entries[order], empty) for entries, empty in slots)
    return values, latents, near


def backward_by(
    encode_backward: Callable[..., tuple[Tensor | None, ...]],
    grad_values: Tensor,
    grad_l0: Tensor,
    values: Tensor,
    indices: Tensor,
    near: Tensor,
    x: Tensor,
    W_enc: Tensor,
    threshold: Tensor,
    bandwidth: float,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of x [N, D], W_enc [F, D], b_enc [F] and threshold [F] by the encoder's backward pass of a backend."""
    encoder, d_threshold = encode_backward(grad_values, values, indices, x, W_enc, needed[:3]), None
    if needed[3]:
        # A latent's threshold collects from its slots as its bias does.
        at = threshold.to(grad_l0.dtype)[indices.clamp_min(0)]
        step = 1 / bandwidth if bandwidth else 0.0
        grad = (grad_values * at + grad_l0[:, None]) * -step
        slots = (grad.to(x.dtype), near.to(x.dtype), indices)
        d_threshold = encode_backward(*slots, x, W_enc, [False, False, True])[2]
    return *encoder, d_threshold


def fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, indices = fake_slots(x)
    l0 = x.new_empty(len(x), dtype=accumulation_dtype(x.dtype))
    return values, indices, l0, torch.empty_like(indices, dtype=torch.bool)


def _implementation(forward: Callable[..., Any], encode_backward: Callable[..., Any]) -> Implementation:
    """With `l0` counted from the slots that `forward` returns."""

    def counted(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values, indices, near = forward(x, *rest)
        return values, indices, (values > 0).sum(1).to(accumulation_dtype(x.dtype)), near

    return Implementation(counted, partial(backward_by, encode_backward))


def _torch() -> Implementation:
    return _implementation(forward_torch, partial(encode_backward, TORCH))


def _numba() -> Implementation:
    from sparseclt.ops._numba import SUMS

    # Compiled selection would be no faster here.
    return _implementation(forward_torch, partial(encode_backward, SUMS))


def _triton() -> Implementation:
    from csrc_triton.jumprelu_encode import forward
    from csrc_triton.topk_encode import backward

    return _implementation(forward, backward)


OPERATOR = Operator(
    "jumprelu_encode(Tensor x, Tensor W_enc, Tensor? b_enc, Tensor threshold, float bandwidth, SymInt scratch_bytes,"
    " str backend) -> (Tensor values, Tensor indices, Tensor l0, Tensor near)",
    {"torch": _torch, "numba": _numba, "triton": _triton},
    fake,
    backward="grad_values, grad_l0, values, indices, near, x, W_enc, threshold, bandwidth, needed"
    " -> x, W_enc, b_enc, threshold",
    vectors={"b_enc": "W_enc"},
)
