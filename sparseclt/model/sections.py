"""Slots sorted by row, cut where chunks of rows begin."""

from collections.abc import Sequence

import torch

from sparseclt.ops.rows import Transpose


def cut(transposed: Sequence[Transpose], first: Sequence[int], rows: int, size: int) -> list[list[Transpose]]:
    """Of each of `transposed`, the rows from its `first` on, `rows` of them, in sections of `size` rows.

    A section is a transpose by itself, with rows from 0 on and without the empty slots. The host waits for the device
    once, to learn where all of them begin.
    """
    if not transposed or not rows:
        return [[] for _ in transposed]
    bounds = [t.bounds()[start : start + rows + 1] for t, start in zip(transposed, first, strict=True)]
    ends = torch.stack([torch.cat([b[:-1:size], b[-1:]]).long() for b in bounds]).tolist()
    return [_sections(t, b, places, size) for t, b, places in zip(transposed, bounds, ends, strict=True)]


def _sections(transposed: Transpose, bounds: torch.Tensor, places: list[int], size: int) -> list[Transpose]:
    found = []
    for number, (low, high) in enumerate(zip(places, places[1:], strict=False)):
        starts = bounds[number * size : (number + 1) * size + 1] - low
        starts[-1] = 0  # no empty slots: they would begin, and end, at 0
        found.append(Transpose(transposed.order[low:high], starts.roll(1)))
    return found
