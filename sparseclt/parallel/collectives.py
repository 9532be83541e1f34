"""Exchanges between ranks that can be differentiated.

The convention, which makes every gradient right without a factor: each rank differentiates its own share of the loss.
The gradient of a tensor that all ranks have alike is therefore a part on each of them, and the parts are added up where
that tensor came from a sharded one; of a sharded tensor a rank has all of the gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparseclt.parallel.group import Group


def to_columns(rows: Tensor, group: Group) -> Tensor:
    """This rank's columns of all rows, [F, D/n], of its rows [F/n, D]. Differentiable."""
    return _exchanged(rows, group, columns_of, rows_of)


def to_rows(columns: Tensor, group: Group) -> Tensor:
    """This rank's rows, [F/n, D], of its columns [F, D/n] of all rows. Differentiable."""
    return _exchanged(columns, group, rows_of, columns_of)


def scatter_rows(parts: Tensor, group: Group) -> Tensor:
    """This rank's rows [F/n, ...] of the sum over ranks of `parts` [F, ...]. Differentiable."""
    return _exchanged(parts, group, _summed_rows, gather_rows)


def all_rows(rows: Tensor, group: Group) -> Tensor:
    """All rows [F, ...] of the ranks' rows [F/n, ...]. Differentiable."""
    return _exchanged(rows, group, gather_rows, _summed_rows)


def gather_columns(columns: Tensor, group: Group) -> Tensor:
    """All columns [N, D] of the ranks' columns [N, D/n]. Differentiable."""
    return _exchanged(columns, group, side_by_side, _summed_columns)


def sum_over(part: Tensor, group: Group) -> Tensor:
    """The sum over ranks of `part`. Differentiable: each rank has the gradient of its own part."""
    return _exchanged(part, group, _summed, _as_it_is)


def columns_of(rows: Tensor, group: Group) -> Tensor:
    """`to_columns`, without a gradient."""
    parts = rows.unflatten(1, (group.size, -1)).transpose(0, 1)  # [n, F/n, D/n], for each rank its columns
    return group.exchange(parts).flatten(0, 1)


def rows_of(columns: Tensor, group: Group) -> Tensor:
    """`to_rows`, without a gradient."""
    parts = group.exchange(columns.unflatten(0, (group.size, -1)))  # [n, F/n, D/n], from each rank its columns
    return parts.transpose(0, 1).flatten(1)


def gather_rows(rows: Tensor, group: Group) -> Tensor:
    """All rows [F, ...] of the ranks' rows [F/n, ...], without a gradient."""
    return rows if group.alone else group.gather(rows).flatten(0, 1)


def side_by_side(columns: Tensor, group: Group) -> Tensor:
    """`gather_columns`, without a gradient."""
    return columns if group.alone else group.gather(columns).transpose(0, 1).flatten(1)


Exchange = Callable[[Tensor, Group], Tensor]


def _summed_rows(parts: Tensor, group: Group) -> Tensor:
    return group.reduce_scatter(parts.unflatten(0, (group.size, -1)))


def _summed_columns(parts: Tensor, group: Group) -> Tensor:
    return group.reduce_scatter(parts.unflatten(1, (group.size, -1)).transpose(0, 1))


def _summed(part: Tensor, group: Group) -> Tensor:
    return group.sum_(part.clone())


def _as_it_is(grad: Tensor, group: Group) -> Tensor:
    return grad


def _exchanged(tensor: Tensor, group: Group, forward: Exchange, backward: Exchange) -> Tensor:
    """`forward` of a tensor, whose gradient goes back by `backward`."""
    if group.alone:
        return tensor
    exchanged: Tensor = _Exchanged.apply(tensor, group, forward, backward)
    return exchanged


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Group, forward: Exchange, backward: Exchange) -> Tensor:
        ctx.group, ctx.back = group, backward
        return forward(tensor, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.group), None, None, None
