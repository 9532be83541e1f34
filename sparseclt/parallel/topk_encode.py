"""The exact top-k of an encoder whose rows are spread over ranks."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparseclt import ops
from sparseclt.parallel.group import Group


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    group: Group | dist.ProcessGroup | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k strongest of all ranks' latents: values [N, K] in descending order and indices [N, K] int64 in 0..F-1, the
    same on every rank.

    Equivalent to `ops.topk_encode(x, cat(W_enc of all ranks), cat(b_enc), k)`, ties included; rank r holds the latents
    from r F/n on. Each rank sends N k values and ids. Differentiable in `x`, `W_enc` and `b_enc`: each rank
    differentiates its share of the loss (`parallel.collectives`), and so has a part of the gradient of `x`, and all of
    that of its own rows. In fp16 and bf16, the latents of different ranks are compared after rounding.

    `x` [N, D], the same on every rank; `W_enc` [F/n, D] and `b_enc` [F/n] or None, this rank's; `group`: a
    `torch.distributed` process group, or None for one rank. `backend` and errors as in `ops.topk_encode`; k is at most
    F.
    """
    group, rows = Group.of(group), len(W_enc)
    if isinstance(k, int) and k > rows * group.size:
        raise ValueError(f"k: expected from 1 to F={rows * group.size} (latents of all ranks), got {k}")
    values, indices = ops.topk_encode(x, W_enc, b_enc, min(k, rows), backend=backend)
    return strongest(values, indices, k, rows, group)


def strongest(values: Tensor, indices: Tensor, k: int, rows: int, group: Group) -> tuple[Tensor, Tensor]:
    """The k largest of the ranks' values, [..., k] in descending order, ties to the lowest rank, then as they come; and
    their indices over all ranks. Differentiable in `values`.

    `values` `indices` [..., K]: those of this rank in descending order, indices into its `rows` latents.
    """
    if group.alone:
        return values, indices
    merged: tuple[Tensor, Tensor] = _Strongest.apply(values, indices, k, rows, group)
    return merged


class _Strongest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, k: int, rows: int, group: Group) -> tuple[Tensor, Tensor]:
        own = (indices + group.rank * rows).to(torch.int32 if rows * group.size < 2**31 else torch.int64)
        side_by_side = [group.gather(tensor).movedim(0, -2).flatten(-2) for tensor in (values, own)]  # [..., n K]
        # Stably: of equal values, those of the lowest rank, which has the lowest ids, come first.
        best, place = side_by_side[0].sort(dim=-1, descending=True, stable=True)
        best, place = best[..., :k].contiguous(), place[..., :k]
        chosen = side_by_side[1].gather(-1, place).long()
        ctx.save_for_backward(place)
        ctx.group, ctx.K = group, values.shape[-1]
        ctx.mark_non_differentiable(chosen)
        return best, chosen

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        (place,) = ctx.saved_tensors
        # One place more than this rank has slots, for the latents of others.
        slot = (place - ctx.group.rank * ctx.K).masked_fill(place // ctx.K != ctx.group.rank, ctx.K)
        own = grad.new_zeros(*grad.shape[:-1], ctx.K + 1)
        own.scatter_(-1, slot, ctx.group.sum_(grad.clone()))
        return own[..., :-1], None, None, None, None
