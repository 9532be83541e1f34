"""The connections of every latent, in both directions, as tables."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sparseclt.model.clt import SparseCLT
from sparseclt.observations.gather import Gathered

DOWNSTREAM = 64  # connections listed for a latent that many others read
DENSE_ENTRIES = 1 << 22  # of the dense block in which upstream latents of examples are looked up


@dataclass(frozen=True)
class Incoming:
    """The connections [F, C] of one module; arrays as in `Gathered`, statistics over the tokens on which the reading
    latent fires."""

    upstream: NDArray[np.int64]  # ids over all modules side by side, -1: empty or closed
    V: NDArray[np.float64]  # of attention: the head's with the largest |V|
    mean: NDArray[np.float64]  # mean of V z_up / scale
    together: NDArray[np.float64]  # share of the tokens with z_up > 0


@dataclass(frozen=True)
class Outgoing:
    """All connections of a CLT, sorted by the latent that is read; `begins` [M F + 1] finds its own."""

    begins: NDArray[np.int64]
    module: NDArray[np.int32]
    latent: NDArray[np.int32]
    V: NDArray[np.float32]
    mean: NDArray[np.float32]
    together: NDArray[np.float32]

    def of(self, upstream: int) -> tuple[int, NDArray[np.int64]]:
        """How many read latent `upstream`, and the places of those to which it contributes most."""
        places = np.arange(self.begins[upstream], self.begins[upstream + 1])
        return len(places), places[np.argsort(-np.abs(self.mean[places]), kind="stable")[:DOWNSTREAM]]


def incoming(clt: SparseCLT, gathered: Gathered) -> list[Incoming | None]:
    """One entry per module; None where it has no connections."""
    tables: list[Incoming | None] = []
    for m, (module, sums) in enumerate(zip(clt, gathered.connections, strict=True)):
        V, is_open = gathered.virtual_weights[m], module.open_connections()
        if sums is None or V is None or is_open is None or module.connection_indices is None:
            tables.append(None)
            continue
        if V.dim() == 3:
            V = V.gather(0, V.abs().argmax(0, keepdim=True))[0]
        fired = np.maximum(gathered.spools["sparse"].fired[m], 1)[:, None]
        upstream = module.connection_indices.long().masked_fill(~is_open, -1)
        contribution, together = sums.contribution.cpu().numpy(), sums.together.cpu().numpy()
        tables.append(
            Incoming(upstream.cpu().numpy(), V.double().cpu().numpy(), contribution / fired, together / fired)
        )
    return tables


def outgoing(tables: list[Incoming | None], latents: int) -> Outgoing:
    """The same connections by the latent that is read; `latents`: of all modules."""
    parts = []
    for m, table in enumerate(tables):
        if table is not None:
            latent, slot = (table.upstream >= 0).nonzero()
            here = latent, slot
            module = np.full(len(latent), m)
            parts.append((table.upstream[here], module, latent, table.V[here], table.mean[here], table.together[here]))
    if not parts:
        none = np.zeros(0)
        return Outgoing(np.zeros(latents + 1, np.int64), *(none.astype(t) for t in ("i4", "i4", "f4", "f4", "f4")))
    upstream, module, latent, V, mean, together = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.argsort(upstream, kind="stable")
    begins = np.searchsorted(upstream[order], np.arange(latents + 1))
    return Outgoing(
        begins,
        module[order].astype(np.int32),
        latent[order].astype(np.int32),
        V[order].astype(np.float32),
        mean[order].astype(np.float32),
        together[order].astype(np.float32),
    )


def flow(clt: SparseCLT, gathered: Gathered) -> NDArray[np.float64]:
    """[M, M]: mean over tokens of the sum of |contribution| that each module (row) takes from each other (column)."""
    M, F = len(clt.sites), clt.architecture.latents
    result = np.zeros((M, M))
    for m, (module, sums) in enumerate(zip(clt, gathered.connections, strict=True)):
        if sums is not None and module.connection_indices is not None:
            source = (module.connection_indices.clamp_min(0) // F).flatten().cpu().numpy()
            size = sums.contribution.abs().flatten().cpu().numpy()
            result[m] = np.bincount(source, size, minlength=M) / max(gathered.counted, 1)
    return result


def contributions(
    clt: SparseCLT, gathered: Gathered, module: int, latent: NDArray[np.int64], token: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[E, C]: V z_up / scale of every connection of a module's `latent` [E] at `token` [E].

    Of an attention module it is known for the largest values only, and NaN elsewhere.
    """
    sums = gathered.connections[module]
    if sums is not None and sums.strongest is not None:
        device = sums.strongest.token.device
        found, known = sums.strongest.find(torch.tensor(latent, device=device), torch.tensor(token, device=device))
        return found.masked_fill(~known[:, None], float("nan")).double().cpu().numpy()
    connections, V = clt.transcoder(module).connection_indices, gathered.virtual_weights[module]
    assert connections is not None and V is not None
    upstream, F = clt.upstream[module], clt.architecture.latents
    indices, weights = connections[latent].clamp_min(0).cpu().numpy(), V[latent].double().cpu().numpy()
    scale = gathered.scale[clt.sites[module].layer, token].astype(np.float64)
    z = np.zeros(indices.shape)
    piece = max(1, DENSE_ENTRIES // (upstream * F))
    for start in range(0, len(token), piece):
        here = slice(start, start + piece)
        values, ids = gathered.spools["sparse"].at(token[here], upstream)
        dense = np.zeros((len(ids), upstream * F))
        row = np.arange(len(ids))[:, None]
        np.add.at(dense, (np.broadcast_to(row, ids.shape), ids), values)
        z[here] = np.take_along_axis(dense, indices[here], 1)
    return weights * z / scale[:, None]
