"""The tokens that show best what a latent is, with the text around them, and the distribution of its values."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparseclt.observations.gather import STRONGEST, Firings

TOP, QUARTERS, PER_QUARTER = STRONGEST, 4, 4  # examples
BEFORE, AFTER = 16, 8  # tokens shown around an example
BINS = 20


@dataclass(frozen=True)
class Examples:
    """Examples of several latents, by latent; W = BEFORE + 1 + AFTER."""

    latent: NDArray[np.int64]  # [E]
    group: NDArray[np.int64]  # [E] 0: largest values; 1 to 4: quarters of all values, from the largest down
    token: NDArray[np.int64]  # [E] number in the text
    value: NDArray[np.float32]  # [E]
    start: NDArray[np.int64]  # [E] first token of the window
    window: NDArray[np.int64]  # [E, W] ids of tokens, -1 behind the end of the row
    values: NDArray[np.float32]  # [E, W] the latent's value on each of them


def choose(firings: Firings, rows: NDArray[np.int32]) -> Examples:
    """For each latent the TOP largest values, at most one from each row of text, and PER_QUARTER evenly spaced ones of
    each quarter of its values in order of size. `rows` [R, S]."""
    R, S = rows.shape
    order = np.lexsort((firings.token, -firings.value, firings.latent))
    latent = firings.latent[order] - firings.first
    counts = np.bincount(latent, minlength=firings.last - firings.first)
    begins = np.cumsum(counts) - counts
    _, leaders = np.unique(latent * R + firings.token[order] // S, return_index=True)
    leaders.sort()
    led = latent[leaders]
    rank = np.arange(len(leaders)) - np.searchsorted(led, led)
    top = leaders[rank < TOP]
    fractions = (np.arange(QUARTERS * PER_QUARTER) + 0.5) / (QUARTERS * PER_QUARTER)
    spread = np.floor(fractions * counts[:, None]).astype(np.int64)  # [latents, QUARTERS x PER_QUARTER] ranks
    fresh = (np.diff(spread, axis=1, prepend=-1) > 0) & (counts > 0)[:, None]
    chosen = np.concatenate([top, (begins[:, None] + spread)[fresh]])
    quarter = np.broadcast_to(1 + np.arange(spread.shape[1]) // PER_QUARTER, spread.shape)[fresh]
    group = np.concatenate([np.zeros(len(top), np.int64), quarter])
    sorted_by = np.lexsort((group, latent[chosen]))  # stable: within a group from the largest down
    return _with_windows(firings, rows, order[chosen[sorted_by]], group[sorted_by])


def _with_windows(
    firings: Firings, rows: NDArray[np.int32], chosen: NDArray[np.int64], group: NDArray[np.int64]
) -> Examples:
    S, N = rows.shape[1], rows.size
    latent, token = firings.latent[chosen], firings.token[chosen]
    row_start = token // S * S
    start = np.maximum(token - BEFORE, row_start)
    window = start[:, None] + np.arange(BEFORE + 1 + AFTER)
    shown = window < np.minimum(token + AFTER + 1, row_start + S)[:, None]
    keys, wanted = firings.latent * N + firings.token, latent[:, None] * N + window
    place = np.searchsorted(keys, wanted).clip(max=max(len(keys) - 1, 0))
    fires = shown & (keys[place] == wanted)
    return Examples(
        latent,
        group,
        token,
        firings.value[chosen],
        start,
        np.where(shown, rows.reshape(-1)[window.clip(max=N - 1)], -1),
        np.where(fires, firings.value[place], 0),
    )


def histograms(firings: Firings, largest: NDArray[np.float32]) -> NDArray[np.int64]:
    """[latents, BINS]: firings by value, in equal bins from 0 to each latent's `largest` value [latents]."""
    latent = firings.latent - firings.first
    bins = np.minimum((firings.value / largest[latent] * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(latent * BINS + bins, minlength=len(largest) * BINS)
    return counts.reshape(-1, BINS)


def largest_and_sum(firings: Firings) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Largest value and sum of all values of each latent; 0 where it never fired."""
    latent, latents = firings.latent - firings.first, firings.last - firings.first
    largest = np.zeros(latents, np.float32)
    np.maximum.at(largest, latent, firings.value)
    return largest, np.bincount(latent, firings.value, minlength=latents).astype(np.float64)
