"""What each latent does in vanilla mode, one latent after the other, as other tools show it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sparseclt.model.activations import at_least_float32
from sparseclt.model.clt import SparseCLT
from sparseclt.observations.examples import choose, histograms, largest_and_sum
from sparseclt.observations.gather import Firings, Gathered, ranges
from sparseclt.observations.logits import Extremes, Histogram, extremes, histogram

SHARD = 256  # latents at a time
PERCENTILES = np.arange(1, 101)


@dataclass(frozen=True)
class Example:
    """A token on which a latent fired, with the text around it."""

    group: int
    """0: the largest values; 1 to 4: quarters of all values, from the largest down."""
    position: int
    """That of the token in the window."""
    tokens: list[int]
    values: list[float]
    """The latent's value on each of the tokens."""


@dataclass(frozen=True)
class LatentPage:
    """What one latent does."""

    latent: int
    fired: int
    """Tokens on which it fired."""
    smallest: float
    largest: float
    """Of its values where it fired; 0 if it never did."""
    bins: list[int]
    """Firings by value, in equal bins from 0 to `largest`."""
    percentiles: list[float]
    """1 to 100, of its values where it fired; none if it never did."""
    examples: list[Example]
    logits: Extremes
    """Of the sum of its decoders: [1, SHOWN]."""
    logit_bins: Histogram
    """Of the same, over the vocabulary."""


def latent_pages(clt: SparseCLT, module: int, gathered: Gathered, directions: Tensor) -> Iterator[LatentPage]:
    """The latents of a module, in order. `directions` [vocabulary, D]: those of `logit_directions`."""
    spool, F = gathered.spools["vanilla"], clt.architecture.latents
    W_dec = clt.transcoder(module).W_dec
    for first, last in ranges([spool], module, SHARD):
        held = spool.firings(module, first, last)
        for start in range(first, last, SHARD):
            end = min(start + SHARD, last, F)
            decoders = at_least_float32(W_dec[start:end].detach()).sum(1)
            yield from _pages(held.between(start, end), gathered.rows, decoders, directions)


def _pages(firings: Firings, rows: NDArray[np.int32], decoders: Tensor, directions: Tensor) -> Iterator[LatentPage]:
    largest, _ = largest_and_sum(firings)
    found, logit_bins = extremes(decoders, directions), histogram(decoders, directions)
    bins, chosen = histograms(firings, largest), choose(firings, rows)
    shown: dict[int, list[Example]] = {}
    for e, latent in enumerate(chosen.latent.tolist()):
        length = int((chosen.window[e] >= 0).sum())
        example = Example(
            int(chosen.group[e]),
            int(chosen.token[e] - chosen.start[e]),
            chosen.window[e][:length].tolist(),
            chosen.values[e][:length].tolist(),
        )
        shown.setdefault(latent, []).append(example)
    begins = np.searchsorted(firings.latent, np.arange(firings.first, firings.last + 1))
    for i, latent in enumerate(range(firings.first, firings.last)):
        values = firings.value[begins[i] : begins[i + 1]]
        yield LatentPage(
            latent,
            len(values),
            float(values.min()) if len(values) else 0.0,
            float(largest[i]),
            bins[i].tolist(),
            np.percentile(values, PERCENTILES).tolist() if len(values) else [],
            shown.get(latent, []),
            Extremes(*(part[i : i + 1] for part in (found.top, found.top_values, found.bottom, found.bottom_values))),
            logit_bins[i],
        )
