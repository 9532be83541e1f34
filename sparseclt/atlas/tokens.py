"""The latents that each token activates."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseclt.observations.gather import Firings

OF_A_LATENT = 8  # tokens kept for each latent and mode
OF_A_TOKEN = 100  # latents kept for each token and mode


class TokenIndex:
    """For each token the latents of which it makes up most, in one mode: shares of a latent's summed values."""

    def __init__(self, rows: NDArray[np.int32], vocabulary: int):
        self.rows, self.vocabulary = rows.reshape(-1), vocabulary
        self._parts: list[tuple[NDArray[Any], ...]] = []

    def add(self, module: int, firings: Firings) -> NDArray[np.int64]:
        """Take in some latents of a module; returns the token of the largest share of each, -1: never fired."""
        latent = firings.latent - firings.first
        token = self.rows[firings.token].astype(np.int64)
        pair, inverse = np.unique(latent * self.vocabulary + token, return_inverse=True)
        mass = np.bincount(inverse, firings.value, minlength=len(pair))
        owner, token = pair // self.vocabulary, pair % self.vocabulary
        total = np.bincount(owner, mass, minlength=firings.last - firings.first)
        order = np.lexsort((token, -mass, owner))
        owner, token, share = owner[order], token[order], (mass / total[owner])[order]
        rank = np.arange(len(owner)) - np.searchsorted(owner, owner)
        kept = rank < OF_A_LATENT
        modules = np.full(int(kept.sum()), module)
        self._parts.append((token[kept], modules, owner[kept] + firings.first, share[kept]))
        first = np.full(firings.last - firings.first, -1)
        first[owner[rank == 0]] = token[rank == 0]
        return first

    def by_token(self) -> dict[int, list[list[float]]]:
        """token -> [[module, latent, share], ...], the largest share first."""
        if not self._parts:
            return {}
        token, module, latent, share = (np.concatenate(part) for part in zip(*self._parts, strict=True))
        order = np.lexsort((latent, module, -share, token))
        token, module, latent, share = token[order], module[order], latent[order], share[order]
        kept = np.arange(len(token)) - np.searchsorted(token, token) < OF_A_TOKEN
        found: dict[int, list[list[float]]] = {}
        for t, m, i, s in zip(token[kept], module[kept], latent[kept], share[kept], strict=True):
            found.setdefault(int(t), []).append([int(m), int(i), round(float(s), 4)])
        return found
