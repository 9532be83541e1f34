"""The connections worth keeping: the C upstream latents that matter most to each downstream latent."""

import torch
from torch import Tensor

from sparseclt.ops._rows import SCRATCH_BYTES, chunks
from sparseclt.ops.backend import implements, lookup
from sparseclt.ops.checks import check_shapes, check_tensors, shape_like


def select_connections(
    W_enc: Tensor,
    E: Tensor,
    importance: Tensor,
    C: int,
    *,
    backend: str | None = None,
    scratch_bytes: int = 8 * SCRATCH_BYTES,
) -> Tensor:
    """Upstream ids [F, C] int64 with the largest importance x |virtual weight|, best first. No gradient.

    Equivalent to `(importance * (W_enc @ E.T).abs()).topk(C).indices`. With heads, `W_enc` [H, F, D], the
    root of the sum over heads of squared virtual weights stands for the absolute value.

    `W_enc` [F, D] or [H, F, D] downstream encoder, `E` [U, D] effective decoders of all upstream latents,
    `importance` [U], or [F, U] one for each pair, at least 0. `scratch_bytes` bounds the scores alive at a time
    (one latent's at least).
    Raises ValueError (shapes, C outside 1..U, devices, backend), TypeError (dtypes).
    """
    check_tensors(W_enc=W_enc, E=E, importance=importance)
    letters = shape_like("W_enc", W_enc, "F D", "H F D")
    pairs = shape_like("importance", importance, "U", "F U")
    sizes = check_shapes(W_enc=(W_enc, letters), E=(E, "U D"), importance=(importance, pairs))
    if not 1 <= C <= sizes["U"]:
        raise ValueError(f"C: expected from 1 to {sizes['U']} (there are {sizes['U']} upstream latents), got {C}")
    with torch.no_grad():
        rows = W_enc if "H" in sizes else W_enc[None]
        return lookup("select_connections", backend)(rows, E, importance, C, scratch_bytes)


@implements("select_connections", "reference")
def select_connections_reference(
    W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int = 0
) -> Tensor:
    return (importance * (W_enc @ E.T).norm(dim=0)).topk(C).indices


@implements("select_connections", "torch")
def select_connections_torch(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int) -> Tensor:
    H, F, _ = W_enc.shape
    connections = torch.empty(F, C, dtype=torch.int64, device=E.device)
    buffers = 1 if H == 1 else 2
    for part in chunks(F, buffers * len(E) * E.element_size(), scratch_bytes):
        score = W_enc[0, part] @ E.T
        if H == 1:
            score.abs_()
        else:
            score.square_()
            for head in range(1, H):
                score += (W_enc[head, part] @ E.T).square_()
            score.sqrt_()
        connections[part] = score.mul_(importance if importance.dim() == 1 else importance[part]).topk(C).indices
    return connections
