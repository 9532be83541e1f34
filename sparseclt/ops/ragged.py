"""Rows of different lengths: side by side with row pointers, or padded to slots of index -1."""

import torch
from torch import Tensor

from sparseclt.ops.checks import check_device, check_indices, check_shapes, check_tensors


def pad_rows(values: Tensor, indices: Tensor, row_pointers: Tensor) -> tuple[Tensor, Tensor]:
    """Padded slots, values [N, S] and indices [N, S], of N rows that lie side by side; S is the longest row's length.

    Equivalent to `pad_sequence([values[a:b] for a, b in pairwise(row_pointers)], batch_first=True)`, and the same of
    the indices with -1. Differentiable in values.

    `values` `indices` [M], `row_pointers` [N+1]: row n is values[row_pointers[n] : row_pointers[n+1]].
    Raises ValueError (shapes, devices, pointers that do not rise from 0 to M), TypeError (dtypes).
    """
    check_tensors(values=values)
    check_indices("indices", indices)
    check_indices("row_pointers", row_pointers)
    M = check_shapes(values=(values, "M"), indices=(indices, "M"), row_pointers=(row_pointers, "N+1"))["M"]
    check_device("indices", indices, "values", values)
    check_device("row_pointers", row_pointers, "values", values)
    lengths = row_pointers.diff()
    rising = len(row_pointers) > 0 and bool((lengths >= 0).all())
    if not rising or int(row_pointers[0]) != 0 or int(row_pointers[-1]) != M:
        raise ValueError(f"row_pointers: expected to rise from 0 to M={M}, got {row_pointers.tolist()[:8]}")
    filled = filled_slots(lengths)
    padded = values.new_zeros(filled.shape).masked_scatter(filled, values)
    return padded, indices.new_full(filled.shape, -1).masked_scatter(filled, indices)


def unpad_rows(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse: values [M], indices [M] and row_pointers [N+1] int64 of padded slots, without those of index -1.

    Equivalent to `values[indices >= 0], indices[indices >= 0]`. Differentiable in values.

    `values` `indices` [N, S]. Raises ValueError (shapes, devices), TypeError (dtypes).
    """
    check_tensors(values=values)
    check_indices("indices", indices)
    check_shapes(values=(values, "N S"), indices=(indices, "N S"))
    check_device("indices", indices, "values", values)
    filled = indices >= 0
    row_pointers = filled.new_zeros(len(indices) + 1, dtype=torch.int64)
    torch.cumsum(filled.sum(1), 0, out=row_pointers[1:])
    return values[filled], indices[filled], row_pointers


def filled_slots(lengths: Tensor) -> Tensor:
    """Boolean [N, S]: the first lengths[n] slots of row n; S is the largest length."""
    longest = int(lengths.max()) if len(lengths) else 0
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


def slot_order(rows: Tensor, values: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """How entries [M] of given rows become padded slots: their order, row after row, values descending and ties as
    they come; and which slots [N, S] they fill."""
    order = values.sort(descending=True, stable=True).indices
    return order[rows[order].sort(stable=True).indices], filled_slots(torch.bincount(rows, minlength=N))


def fill_slots(filled: Tensor, entries: Tensor, empty: int) -> Tensor:
    """[N, S]: entries [M], as `slot_order` ordered them, in their slots."""
    return entries.new_full(filled.shape, empty).masked_scatter_(filled, entries)
