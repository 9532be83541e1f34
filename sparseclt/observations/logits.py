"""The direct effect of a latent's decoders on the model's logits."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

SHOWN = 10
LOGIT_BINS = 40
ENTRIES = 1 << 24  # of the logits held at a time


@dataclass(frozen=True)
class Extremes:
    """The SHOWN largest and smallest logits of n rows: ids and values [n, SHOWN]."""

    top: Tensor
    top_values: Tensor
    bottom: Tensor
    bottom_values: Tensor


@torch.no_grad()
def extremes(rows: Tensor, directions: Tensor) -> Extremes:
    """Of `rows` [n, D], a few at a time, written to the residual stream, before the final norm's scale divides.
    `directions` [vocabulary, D]: those of `logit_directions`."""
    vocabulary = len(directions)
    k, parts = min(SHOWN, vocabulary), []
    for some in rows.split(max(1, ENTRIES // vocabulary)):
        logits = some.to(directions.dtype) @ directions.T
        top, bottom = logits.topk(k, 1), logits.topk(k, 1, largest=False)
        parts.append((top.indices, top.values, bottom.indices, bottom.values))
    return Extremes(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


class Histogram(NamedTuple):
    """Counts in equal bins, and the middle of each bin."""

    counts: list[int]
    middles: list[float]


@torch.no_grad()
def histogram(rows: Tensor, directions: Tensor) -> list[Histogram]:
    """The logits over the vocabulary of each of `rows` [n, D], as in `extremes`, in LOGIT_BINS bins."""
    found = []
    for some in rows.split(max(1, ENTRIES // len(directions))):
        for logits in (some.to(directions.dtype) @ directions.T).cpu().numpy():
            counts, edges = np.histogram(logits, LOGIT_BINS)
            found.append(Histogram(counts.tolist(), ((edges[:-1] + edges[1:]) / 2).tolist()))
    return found
