"""The C upstream latents that matter most to each downstream latent; the [F, U] scores never exist as a whole."""

import torch
from torch import Tensor

from . import select
from .launch import AheadOfTime, launcher
from .scores import ahead_of_time_connections, connection_scores
from .stream import SCRATCH_BYTES, streamed_topk


@launcher
def forward(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int = SCRATCH_BYTES) -> Tensor:
    """`(importance * (W_enc @ E.T).norm(dim=0)).topk(C).indices`: [F, C] int64, best first, ties to the lowest id.

    `W_enc` [H, F, D] with one head or several, `E` [U, D], `importance` [U].
    """
    U = len(E)
    if not 1 <= C <= U:
        raise ValueError(f"C: expected from 1 to {U}, the number of upstream latents, got {C}")
    if E.dtype != W_enc.dtype:
        raise TypeError(f"E: expected {W_enc.dtype}, the dtype of W_enc, got {E.dtype}; cast one of them")
    connections = torch.empty(W_enc.shape[1], C, dtype=torch.int64, device=E.device)

    def fill(rows: slice, columns: slice, scores: Tensor, maxima: Tensor | None, group: int) -> None:
        connection_scores(W_enc[:, rows], E[columns], importance[columns], scores, maxima, group)

    streamed_topk(fill, W_enc.shape[1], U, C, scratch_bytes, None, connections)
    return connections


def ahead_of_time() -> list[AheadOfTime]:
    return ahead_of_time_connections() + select.ahead_of_time()
