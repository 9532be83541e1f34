"""Exchanges between ranks that can be differentiated.

The convention, which makes every gradient right without a factor: each rank differentiates its own share of the loss.
The gradient of a tensor that all ranks have alike is therefore a part on each of them, and the parts are added up where
that tensor came from a sharded one; of a sharded tensor a rank has all of the gradient.
"""

from typing import Any

import torch
from torch import Tensor

from sparseclt.parallel.group import Group


def to_columns(rows: Tensor, group: Group) -> Tensor:
    """This rank's columns of all rows, [F, D/n], of its rows [F/n, D]. Differentiable."""
    return rows if group.alone else _ToColumns.apply(rows, group)


def to_rows(columns: Tensor, group: Group) -> Tensor:
    """This rank's rows, [F/n, D], of its columns [F, D/n] of all rows. Differentiable."""
    return columns if group.alone else _ToRows.apply(columns, group)


def scatter_rows(parts: Tensor, group: Group) -> Tensor:
    """This rank's rows [F/n, ...] of the sum over ranks of `parts` [F, ...]. Differentiable."""
    return parts if group.alone else _ScatterRows.apply(parts, group)


def all_rows(rows: Tensor, group: Group) -> Tensor:
    """All rows [F, ...] of the ranks' rows [F/n, ...]. Differentiable."""
    return rows if group.alone else _AllRows.apply(rows, group)


def gather_columns(columns: Tensor, group: Group) -> Tensor:
    """All columns [N, D] of the ranks' columns [N, D/n]. Differentiable."""
    return columns if group.alone else _GatherColumns.apply(columns, group)


def sum_over(part: Tensor, group: Group) -> Tensor:
    """The sum over ranks of `part`. Differentiable: each rank has the gradient of its own part."""
    return part if group.alone else _SumOver.apply(part, group)


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


class _ToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return columns_of(rows, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return rows_of(grad, ctx.group), None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return rows_of(columns, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return columns_of(grad, ctx.group), None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.reduce_scatter(parts.unflatten(0, (group.size, -1)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather_rows(grad, ctx.group), None


class _AllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather_rows(rows, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(grad.unflatten(0, (ctx.group.size, -1))), None


class _GatherColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.gather(columns).transpose(0, 1).flatten(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(grad.unflatten(1, (ctx.group.size, -1)).transpose(0, 1)), None


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        return group.sum_(part.clone())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
