"""The latents of all modules so far, side by side, as later modules read them."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.model.modules import Latents


class UpstreamLatents:
    """One buffer [N, M K] for the latents of M modules: a copy per reader would grow as the square of the layers.

    Ids are in 0..U-1 over the modules' F latents each, in model order.
    """

    def __init__(self, modules: int, latents: int):
        self.modules, self.latents = modules, latents
        self._values: list[Tensor] = []  # [N, K] of each module so far, with its graph
        self._buffer: Latents | None = None

    def add(self, latents: Latents) -> None:
        """Put the next module's latents beside those before it."""
        N, K = latents.values.shape
        if self._buffer is None:
            self._buffer = Latents(*(tensor.new_empty(N, self.modules * K) for tensor in latents))
        index = len(self._values)
        columns = slice(index * K, (index + 1) * K)
        # By .data: autograd has saved columns to the left of these, and must not take this for a change of them.
        self._buffer.values.data[:, columns] = latents.values.detach()
        ids = latents.indices + index * self.latents
        self._buffer.indices.data[:, columns] = ids.masked_fill_(latents.indices < 0, -1)
        self._values.append(latents.values)

    def of_first(self, modules: int) -> Latents:
        """The latents of the first so many modules: a view of the buffer, through which gradients reach each module."""
        assert self._buffer is not None
        parts = self._values[:modules]
        width = sum(part.shape[1] for part in parts)
        values, indices = (tensor.data[:, :width] for tensor in self._buffer)
        return Latents(_SideBySide.apply(values, *parts), indices)


class _SideBySide(torch.autograd.Function):
    """`torch.cat(parts, 1)`, which is already in `joined`."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, *parts: Tensor) -> Tensor:
        ctx.parts = len(parts)
        return joined.view_as(joined)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.chunk(ctx.parts, 1)
