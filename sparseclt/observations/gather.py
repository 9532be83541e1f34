"""One pass over text that keeps what the pages of latents need.

Active latents go to a file, token by token; beside it only sums over tokens are held, one number per latent or per
connection. Memory does not depend on the number of tokens.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseclt.evaluation.metrics import captures, modes_of
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations, at_least_float32
from sparseclt.model.clt import SparseCLT
from sparseclt.model.forward import ForwardPass
from sparseclt.model.sites import Mode
from sparseclt.observations.strongest import StrongestFirings

MOST_FIRINGS = 1 << 24  # held in memory at a time
DENSE_ENTRIES = 1 << 18  # of the dense block of latents in which connections are looked up; small enough for a cache
STRONGEST = 10  # firings of an attention latent of which contributions are kept
SCAN_TOKENS = 1 << 16  # read from the file at a time


@dataclass(frozen=True)
class Firings:
    """The tokens on which latents `first` to `last - 1` of one module fired, by latent and then by token."""

    first: int
    last: int
    latent: NDArray[np.int64]
    token: NDArray[np.int64]  # number in the text: row x S + position
    value: NDArray[np.float32]

    def between(self, first: int, last: int) -> "Firings":
        """Those of latents `first` to `last - 1`, as views."""
        part = slice(*np.searchsorted(self.latent, [first, last]))
        return Firings(first, last, self.latent[part], self.token[part], self.value[part])


class Spool:
    """The active latents of every token in a file, by module: `values` and `indices` [M, N, slots], of which a module
    may fill fewer than the one that has the most."""

    def __init__(self, folder: Path, name: str, clt: SparseCLT, tokens: int):
        self.folder, self.name, self.tokens = folder, name, tokens
        self.modules, self.latents = len(clt.sites), clt.architecture.latents
        self.fired = np.zeros((self.modules, self.latents), dtype=np.int64)
        self.values: NDArray[np.float32] | None = None
        self.indices: NDArray[np.int32] | None = None

    def add(self, start: int, forward: ForwardPass, counted: Tensor) -> None:
        """Take in a pass over tokens `start`, `start` + 1, ...; `counted` [N] bool: the others are left out."""
        if self.values is None:
            shape = (self.modules, self.tokens, max(latents.values.shape[1] for latents in forward.latents))
            self.values = np.memmap(self.folder / f"{self.name}.values", np.float32, "w+", shape=shape)
            self.indices = np.memmap(self.folder / f"{self.name}.indices", np.int32, "w+", shape=shape)
        assert self.indices is not None
        for m, latents in enumerate(forward.latents):
            values = latents.values.float() * counted[:, None]
            place = m, slice(start, start + len(values)), slice(values.shape[1])
            self.values[place] = values.cpu().numpy()
            self.indices[place] = latents.indices.int().cpu().numpy()
            on = latents.indices[values > 0]
            self.fired[m] += torch.bincount(on, minlength=self.latents).cpu().numpy()

    def firings(self, module: int, first: int, last: int) -> Firings:
        """The firings of latents `first` to `last - 1` of a module; see `ranges`."""
        assert self.values is not None and self.indices is not None
        parts = []
        for start in range(0, self.tokens, SCAN_TOKENS):
            values = self.values[module, start : start + SCAN_TOKENS]
            indices = self.indices[module, start : start + SCAN_TOKENS]
            on = (values > 0) & (indices >= first) & (indices < last)
            parts.append((indices[on], on.nonzero()[0] + start, values[on]))
        latent, token, value = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = np.argsort(latent, kind="stable")
        return Firings(first, last, latent[order].astype(np.int64), token[order], value[order])

    def at(self, tokens: NDArray[np.int64], modules: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Values and ids [n, modules x slots] of the first modules at some tokens; ids over all modules."""
        assert self.values is not None and self.indices is not None
        offsets = np.arange(modules)[:, None, None] * self.latents
        values = self.values[:modules, tokens].transpose(1, 0, 2).reshape(len(tokens), -1)
        indices = (self.indices[:modules, tokens].clip(0) + offsets).transpose(1, 0, 2).reshape(len(tokens), -1)
        return values, indices


def ranges(spools: Iterable[Spool], module: int, shard: int) -> Iterator[tuple[int, int]]:
    """Latents (first, last + 1) of a module in ranges of whole shards, each with firings that fit in memory."""
    fired = sum(spool.fired[module] for spool in spools)
    assert not isinstance(fired, int)
    first, held = 0, 0
    for start in range(0, len(fired), shard):
        here = int(fired[start : start + shard].sum())
        if held and held + here > MOST_FIRINGS:
            yield first, start
            first, held = start, 0
        held += here
    yield first, len(fired)


class ConnectionSums:
    """Sums over the tokens on which a latent fires in sparsely-connected mode, for each of its connections."""

    def __init__(self, shape: torch.Size, device: torch.device, attention: bool):
        self.strongest = StrongestFirings(shape, STRONGEST, device) if attention else None
        self.contribution = torch.zeros(shape, dtype=torch.float64, device=device)  # [F, C] of V z_up / scale
        self.together = torch.zeros(shape, dtype=torch.float64, device=device)  # [F, C] tokens with z_up > 0

    def add(self, latent: Tensor, contribution: Tensor, upstream: Tensor) -> None:
        """latent [n]: one firing each; contribution and upstream [n, C]: V z_up / scale, and z_up."""
        self.contribution.index_add_(0, latent, contribution.double())
        self.together.index_add_(0, latent, (upstream > 0).double())


@dataclass(frozen=True)
class Gathered:
    """What one pass over `rows` [R, S] left behind."""

    rows: NDArray[np.int32]
    counted: int  # tokens, of R x S
    spools: dict[Mode, Spool]
    connections: list[ConnectionSums | None]  # by module; None without upstream modules
    virtual_weights: list[Tensor | None]  # [F, C] or [H, F, C]
    scale: NDArray[np.float32]  # [L, N] what the norm before each MLP divides by


@torch.no_grad()
def gather(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    folder: Path,
    *,
    modes: Sequence[Mode] | None = None,
    batch_rows: int = 16,
    backend: str | None = None,
) -> Gathered:
    """Run `modes` (None: every mode) over `rows` [R, S]; files of active latents are written to `folder`.

    Tokens that do not count (`Activations.counted`) take no part.
    """
    modes, N = modes or modes_of(clt), rows.numel()
    spools = {mode: Spool(folder, mode, clt, N) for mode in modes}
    scale = np.memmap(folder / "scale", np.float32, "w+", shape=(clt.architecture.model.layers, N))
    sums: list[ConnectionSums | None] = [None] * len(clt.sites)
    weights: list[Tensor | None] = [None] * len(clt.sites)
    if "sparse" in modes:
        weights = clt.virtual_weights(backend)
        shapes = [None if m.connection_indices is None else m.connection_indices.shape for m in clt]
        device = next(clt.parameters()).device
        sums = [
            None if shape is None else ConnectionSums(shape, device, site.kind == "attn")
            for shape, site in zip(shapes, clt.sites, strict=True)
        ]
    start = counted_tokens = 0
    for batch, activations in captures(clt, language_model, rows, batch_rows):
        counted = torch.ones_like(batch, dtype=torch.bool) if activations.counted is None else activations.counted
        for mode in modes:
            forward = clt(activations, mode, backend=backend)
            spools[mode].add(start, forward, counted.flatten())
            if mode == "sparse":
                _add_connections(clt, forward, activations, counted, sums, start)
        for layer, values in enumerate(activations.scale):
            scale[layer, start : start + batch.numel()] = values.flatten().float().cpu().numpy()
        start += batch.numel()
        counted_tokens += int(counted.sum())
    return Gathered(rows.cpu().numpy(), counted_tokens, spools, sums, weights, scale)


def _add_connections(
    clt: SparseCLT,
    forward: ForwardPass,
    activations: Activations,
    counted: Tensor,
    sums: list[ConnectionSums | None],
    first: int,
) -> None:
    """The contributions of one batch, whose first token is `first`, a few tokens at a time (with attention: a row)."""
    B, S = activations.tokens.shape
    M, F = len(clt.sites), clt.architecture.latents
    attention = clt.architecture.attention == "latents"
    piece = S if attention else min(B * S, max(16, DENSE_ENTRIES // (M * F)))
    ids = torch.cat([latents.indices.clamp_min(0) + m * F for m, latents in enumerate(forward.latents)], 1)
    values = (
        at_least_float32(torch.cat([latents.values for latents in forward.latents], 1)) * counted.flatten()[:, None]
    )
    dense = values.new_zeros(piece, M * F)
    for start in range(0, B * S, piece):
        here = slice(start, min(start + piece, B * S))
        block = dense[: here.stop - start]
        block.scatter_add_(1, ids[here], values[here])
        for m, own in enumerate(sums):
            if own is not None:
                _add_reader(clt, m, forward, activations, here, block, own, first + start)
        block.scatter_(1, ids[here], 0)


def _add_reader(
    clt: SparseCLT,
    m: int,
    forward: ForwardPass,
    activations: Activations,
    here: slice,
    block: Tensor,
    sums: ConnectionSums,
    first: int,
) -> None:
    """Contributions to module m's firings on the tokens `here`, whose latents of all modules are `block` [n, M F]."""
    site, connections, V = clt.sites[m], clt.transcoder(m).connection_indices, forward.virtual_weights[m]
    assert connections is not None and V is not None
    F = clt.architecture.latents
    token, latent = block[:, m * F : (m + 1) * F].nonzero(as_tuple=True)
    columns = connections[latent].clamp_min(0)
    if site.kind == "mlp":
        upstream = torch.take(block, token[:, None] * block.shape[1] + columns)
        scale = activations.scale[site.layer].flatten()[here][token]
        contribution = V[latent] * upstream / scale[:, None]
    else:
        mix = activations.rows(here.start // activations.tokens.shape[1], 1).mix(site.layer)[0]
        upstream = contribution = torch.zeros_like(columns, dtype=block.dtype)
        for head, pattern in enumerate(mix.to(block.dtype)):
            mixed = (pattern @ block)[token[:, None], columns]
            upstream = upstream + mixed
            contribution = contribution + V[head][latent] * mixed
    sums.add(latent, contribution, upstream.masked_fill(connections[latent] < 0, 0))
    if sums.strongest is not None:
        sums.strongest.add(first + token, latent, block[token, m * F + latent], contribution)
