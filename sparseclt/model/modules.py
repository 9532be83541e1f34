"""One module of a CLT: an encoder with its decoders, and the latents that it yields."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparseclt import ops
from sparseclt.model.sites import Site


class Latents(NamedTuple):
    """The active latents of one module: `values` [N, K] (0 where a slot is empty) and their `indices` [N, K]."""

    values: Tensor
    indices: Tensor

    def dense(self, latents: int) -> Tensor:
        """[N, F]: for tests and small models only."""
        dense = self.values.new_zeros(len(self.values), latents)
        return dense.scatter_add(1, self.indices.clamp_min(0), self.values)


class Transcoder(nn.Module):
    """The module at one site.

    `W_enc` [F, D], `b_enc` [F], `W_dec` [F, T, D] (T = targets: layers l..L-1 for an MLP, 1 for attention),
    `b_dec` [D]: the bias of this site's own reconstruction. In sparsely-connected mode each latent reads the
    upstream latents named by `connections` ([F, C], ids in 0..U-1 over all earlier modules side by side, or
    None before any were chosen). With learned connections `logits` [F, C] decides which of them are open.
    """

    connections: ops.Connections | None

    def __init__(self, site: Site, d_model: int, latents: int, targets: int, upstream: int):
        super().__init__()
        self.site, self.latents, self.upstream = site, latents, upstream
        bound = 1 / math.sqrt(d_model)
        self.W_enc = nn.Parameter(torch.empty(latents, d_model).uniform_(-bound, bound))
        self.b_enc = nn.Parameter(torch.zeros(latents))
        self.W_dec = nn.Parameter(torch.zeros(latents, targets, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.logits: nn.Parameter | None = None
        self.connections = None

    def connect(self, connections: Tensor) -> None:
        """Take `connections` [F, C] (ids 0..U-1, -1 for an empty slot)."""
        if connections.shape[0] != self.latents:
            raise ValueError(
                f"connections of {self.site.name}: expected {self.latents} rows, got {tuple(connections.shape)}"
            )
        self.connections = ops.Connections(connections, self.upstream)

    def mask(self) -> Tensor | None:
        """Learned connections: hard 0/1 [F, C] with the sigmoid's gradient (straight-through), else None."""
        if self.logits is None:
            return None
        probability = torch.sigmoid(self.logits)
        return (self.logits > 0).to(probability.dtype) - probability.detach() + probability

    def open_connections(self) -> Tensor | None:
        """Boolean [F, C]: slots that are filled and, when learned, switched on."""
        if self.connections is None:
            return None
        filled = self.connections.indices >= 0
        return filled if self.logits is None else filled & (self.logits > 0)

    def decode(self, latents: Latents, backend: str | None = None) -> Tensor:
        """What the latents write to each target, without bias: [N, T, D]."""
        return ops.sparse_decode(latents.values, latents.indices, self.W_dec, backend=backend)
