"""The connections worth keeping: the C upstream latents that matter most to each downstream latent."""

from typing import Any

import torch
from torch import Tensor

from sparseclt.ops._encode import linear, norm_over_heads_, top_k
from sparseclt.ops._torch_rows import accumulation_dtype, chunks
from sparseclt.ops.backend import choose
from sparseclt.ops.checks import check_scratch, check_shapes, check_tensors, shape_like
from sparseclt.ops.registration import Implementation, Operator


def select_connections(
    W_enc: Tensor,
    E: Tensor,
    importance: Tensor,
    C: int,
    *,
    backend: str | None = None,
    scratch_bytes: int | None = None,
) -> Tensor:
    """Upstream ids [F, C] int64 with the largest importance x |virtual weight|, best first. No gradient.

    Equivalent to `(importance * (W_enc @ E.T).abs()).topk(C).indices`, ties to the lowest index. With heads, `W_enc`
    [H, F, D], the root of the sum over heads of the squared virtual weights takes the place of the absolute value.

    `W_enc` [F, D] or [H, F, D] downstream encoder; `E` [U, D] effective decoders of all upstream latents; `importance`
    [U] per upstream latent or [F, U] per pair, at least 0. `scratch_bytes` bounds the scores that are alive at a time
    (at least those of one latent; None: what suits the backend). `backend` as in `topk_encode`.
    Raises ValueError (shapes, C outside 1..U, devices, backend), TypeError (dtypes), ImportError (backend not
    installed).
    """
    check_tensors(W_enc=W_enc, E=E, importance=importance)
    letters = shape_like("W_enc", W_enc, "F D", "H F D")
    pairs = shape_like("importance", importance, "U", "F U")
    sizes = check_shapes(W_enc=(W_enc, letters), E=(E, "U D"), importance=(importance, pairs))
    if not 1 <= C <= sizes["U"]:
        raise ValueError(f"C: expected from 1 to {sizes['U']} (there are {sizes['U']} upstream latents), got {C}")
    backend = choose("select_connections", backend, W_enc)
    scratch = check_scratch(scratch_bytes, "select_connections", backend)
    with torch.no_grad():
        rows = W_enc if "H" in sizes else W_enc[None]
        if backend == "reference":
            return select_connections_reference(rows, E, importance, C)
        connections: Tensor = OPERATOR(rows, E, importance, C, scratch, backend)
        return connections


def connection_scores(W_enc: Tensor, E: Tensor, importance: Tensor) -> Tensor:
    """[F, U], for references: W_enc [H, F, D]."""
    return importance * (W_enc @ E.T).norm(dim=0)


def select_connections_reference(W_enc: Tensor, E: Tensor, importance: Tensor, C: int) -> Tensor:
    scores = connection_scores(W_enc, E, importance)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :C].contiguous()


def forward_torch(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int) -> Tensor:
    H, F, _ = W_enc.shape
    wide, importance = accumulation_dtype(E.dtype), importance.expand(F, len(E))
    connections = torch.empty(F, C, dtype=torch.int64, device=E.device)
    buffers = 1 if H == 1 else 2
    scratch = [E.new_empty(0)] * buffers
    for part in chunks(F, buffers * len(E) * wide.itemsize, scratch_bytes):
        if part.start == 0:
            scratch = [E.new_empty(part.stop, len(E), dtype=wide) for _ in range(buffers)]
        first, next_one = (buffer[: part.stop - part.start] for buffer in (scratch[0], scratch[-1]))
        outs = [first] + [next_one] * (H - 1)
        heads = (linear(W_enc[head, part], E, None, out, scratch_bytes) for head, out in enumerate(outs))
        score = norm_over_heads_(heads)
        connections[part] = top_k(score.mul_(importance[part]), C, zeros_free=False)[1]
    return connections


def fake(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, *_: Any) -> Tensor:
    return W_enc.new_empty(W_enc.shape[1], C, dtype=torch.int64)


def _torch() -> Implementation:
    return Implementation(forward_torch)


def _numba() -> Implementation:
    from sparseclt.ops import _numba as numba

    return Implementation(numba.select_connections)


def _triton() -> Implementation:
    from csrc_triton.select_connections import forward

    return Implementation(forward)


OPERATOR = Operator(
    "select_connections(Tensor W_enc, Tensor E, Tensor importance, SymInt C, SymInt scratch_bytes, str backend)"
    " -> Tensor",
    {"torch": _torch, "numba": _numba, "triton": _triton},
    fake,
)
