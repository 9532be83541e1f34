"""Encoders that keep k latents of a token: topk, abstopk, groupmax. The [N, F] pre-activations never exist."""

import torch
from torch import Tensor

from .launch import launcher
from .scores import encoder_scores
from .stream import SCRATCH_BYTES, streamed_topk


@launcher
def forward(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    scratch_bytes: int = SCRATCH_BYTES,
    activation: str = "topk",
) -> tuple[Tensor, Tensor]:
    N, F = len(x), len(W_enc)
    values = torch.empty(N, k, dtype=x.dtype, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int64, device=x.device)
    absolute = activation == "abstopk"

    def fill(rows: slice, columns: slice, scores: Tensor, maxima: Tensor | None, group: int) -> None:
        b = None if b_enc is None else b_enc[columns]
        encoder_scores(x[rows], W_enc[columns], b, None, scores, maxima, group, absolute=absolute)

    streamed_topk(fill, N, F, k, scratch_bytes, values, indices, relu=not absolute, absolute=absolute)
    return values, indices
