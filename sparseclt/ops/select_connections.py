"""The connections worth keeping: the C upstream latents that matter most to each downstream latent."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseclt.ops._encode import linear, top_k
from sparseclt.ops._registration import define
from sparseclt.ops._rows import SCRATCH_BYTES, accumulation_dtype, chunks
from sparseclt.ops.backend import choose, implementation, register
from sparseclt.ops.checks import check_scratch, check_shapes, check_tensors, shape_like


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

    Equivalent to `(importance * (W_enc @ E.T).abs()).topk(C).indices`, ties to the lowest index. With heads,
    `W_enc` [H, F, D], the root of the sum over heads of squared virtual weights stands for the absolute value.

    `W_enc` [F, D] or [H, F, D] downstream encoder, `E` [U, D] effective decoders of all upstream latents,
    `importance` [U], or [F, U] one for each pair, at least 0. `scratch_bytes` bounds the scores alive at a time
    (one latent's at least; None: what suits the backend).
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
    scratch = check_scratch(scratch_bytes, backend, 8 * SCRATCH_BYTES)
    with torch.no_grad():
        rows = W_enc if "H" in sizes else W_enc[None]
        if backend == "reference":
            return select_connections_reference(rows, E, importance, C)
        connections: Tensor = _select_connections(rows, E, importance, C, scratch, backend)
        return connections


def connection_scores(W_enc: Tensor, E: Tensor, importance: Tensor) -> Tensor:
    """[F, U], for references: W_enc [H, F, D]."""
    return importance * (W_enc @ E.T).norm(dim=0)


def select_connections_reference(W_enc: Tensor, E: Tensor, importance: Tensor, C: int) -> Tensor:
    scores = connection_scores(W_enc, E, importance)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :C].contiguous()


def norm_over_heads_(products: Iterator[Tensor]) -> Tensor:
    """`torch.stack(list(products)).norm(dim=0)`, in the memory of the first, which alone must outlast the next."""
    total, following = next(products), next(products, None)
    if following is None:
        return total.abs_()
    total.square_()
    while following is not None:
        total += following.square_()
        following = next(products, None)
    return total.sqrt_()


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


register("select_connections", "reference", select_connections_reference)
register("select_connections", "torch", forward_torch)


def _run(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int, backend: str) -> Tensor:
    return implementation("select_connections", backend).forward(W_enc, E, importance, C, scratch_bytes)


def _fake(W_enc: Tensor, E: Tensor, importance: Tensor, C: int, scratch_bytes: int, backend: str) -> Tensor:
    return W_enc.new_empty(W_enc.shape[1], C, dtype=torch.int64)


_select_connections = define(
    "select_connections(Tensor W_enc, Tensor E, Tensor importance, SymInt C, SymInt scratch_bytes, str backend)"
    " -> Tensor",
    _run,
    _fake,
)
