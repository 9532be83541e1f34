"""The latents of all modules so far, side by side, as later modules read them."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sparseclt.model.modules import Latents
from sparseclt.model.shape import Architecture
from sparseclt.model.sites import Site


class UpstreamLatents:
    """One buffer [N, sum of K] for the latents of all modules: a copy per reader would grow as the square of the
    layers.

    Ids are in 0..U-1 over the F latents of the modules at `sites` side by side. Every module may have more slots than
    the architecture gives it, by as many as the first one has.
    """

    def __init__(self, architecture: Architecture, sites: Sequence[Site]):
        self.latents = architecture.latents
        self._slots = [architecture.slots_of(site.layer) for site in sites]
        self._starts: list[int] = []
        self._values: list[Tensor] = []  # [N, K] of each module so far, with its graph
        self._buffer: Latents | None = None

    def add(self, latents: Latents) -> None:
        """Put the next module's latents beside those before it."""
        if self._buffer is None:
            more = latents.values.shape[1] - self._slots[0]
            self._starts = list(accumulate((slots + more for slots in self._slots), initial=0))
            self._buffer = Latents(*(tensor.new_empty(len(tensor), self._starts[-1]) for tensor in latents))
        index = len(self._values)
        columns = slice(*self._starts[index : index + 2])
        # By .data: autograd has saved columns to the left of these, and must not take this for a change of them.
        self._buffer.values.data[:, columns] = latents.values.detach()
        ids = latents.indices + index * self.latents
        self._buffer.indices.data[:, columns] = ids.masked_fill_(latents.indices < 0, -1)
        self._values.append(latents.values)

    def of_first(self, modules: int) -> Latents:
        """The latents of the first so many modules: a view of the buffer, through which gradients reach each module."""
        assert self._buffer is not None
        parts = self._values[:modules]
        values, indices = (tensor.data[:, : self._starts[modules]] for tensor in self._buffer)
        return Latents(_SideBySide.apply(values, *parts), indices)


class _SideBySide(torch.autograd.Function):
    """`torch.cat(parts, 1)`, which is already in `joined`."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, *parts: Tensor) -> Tensor:
        ctx.widths = [part.shape[1] for part in parts]
        return joined.view_as(joined)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.split(ctx.widths, 1)
