"""Costs of the dense baselines, op by op, and of a whole training step, ours or dense.

They go with `sparseclt.costs`, which has the letters and the costs of our ops. Bytes of a dense formula are those of
its matrices: once for each product or pointwise pass over them.
"""

from typing import Literal

from sparseclt import costs
from sparseclt.costs import CLTSize, Cost, Passes, Widths, direction

Mode = Literal["vanilla", "both", "residual"]
Way = Literal["sparse", "dense", "floor"]


def _moved(flops: float, moved: float) -> Cost:
    return Cost(flops, moved, moved)


def gemm(w: Widths, rows: int, columns: int, inner: int) -> Cost:
    return _moved(2 * rows * columns * inner, w.number * (rows * inner + columns * inner + rows * columns))


def decode(w: Widths, N: int, D: int, F: int, K: int, T: int = 1) -> Passes:
    product = gemm(w, N, D * T, F) + _moved(0, w.number * N * F)  # z is filled with zeros first
    return {"forward": product, "backward": product * 2}


def encode(w: Widths, N: int, D: int, F: int, K: int) -> Passes:
    product, pointwise = gemm(w, N, F, D), _moved(0, 3 * w.number * N * F)
    return {"forward": product + pointwise, "backward": product * 2 + pointwise}


def weights(w: Widths, D: int, F: int, C: int, U: int) -> Passes:
    product, matrix = gemm(w, F, U, D), _moved(0, w.number * F * U)
    return {"forward": product + matrix, "backward": product * 2 + matrix}


def matmul(w: Widths, N: int, F: int, C: int, U: int, S: int) -> Passes:
    product = gemm(w, N, F, U) + _moved(0, w.number * (N * U + F * U))
    return {"forward": product, "backward": product * 2}


def virtual(w: Widths, N: int, D: int, F: int, C: int, U: int, S: int) -> Passes:
    """Virtual weights, the mask, and the product with upstream latents."""
    mask = _moved(0, 2 * w.number * F * U)
    made, used = weights(w, D, F, C, U), matmul(w, N, F, C, U, S)
    return {name: made[name] + used[name] + mask for name in made}


def connected(w: Widths, N: int, D: int, F: int, K: int, C: int, U: int, S: int) -> Passes:
    own, upstream = encode(w, N, D, F, K), virtual(w, N, D, F, C, U, S)
    return {name: own[name] + upstream[name] for name in own}


def select(w: Widths, D: int, F: int, C: int, U: int) -> Passes:
    forward = costs.select_connections(w, D, F, C, U)["forward"]
    return {"forward": forward + _moved(0, 5 * w.number * F * U)}


def our_virtual(w: Widths, N: int, D: int, F: int, C: int, U: int, S: int) -> Passes:
    """Of ours: `virtual_weights` and then `virtual_matmul`."""
    return _together(costs.virtual_weights(w, D, F, C, U), costs.virtual_matmul(w, N, F, C, U, S))


def our_connected(w: Widths, N: int, D: int, F: int, K: int, C: int, U: int, S: int) -> Passes:
    """Of ours: `virtual_weights` and then `connected_encode`."""
    return _together(costs.virtual_weights(w, D, F, C, U), costs.connected_encode(w, N, D, F, K, C, U, S))


def _together(*ops: Passes) -> Passes:
    return {
        name: costs.total(direction(passes, name == "backward") for passes in ops) for name in ("forward", "backward")
    }


def training_step(way: Way, mode: Mode, w: Widths, L: int, N: int, D: int, F: int, K: int, C: int) -> Cost:
    """Both passes of every encoder and decoder in each mode, virtual weights of every pair of layers, and Adam.

    `way` "floor": only the encode GEMMs of a vanilla step. `mode` "residual": without virtual weights.
    """
    if way == "floor":
        return gemm(w, N, F, D) * L
    modules = costs.total(
        costs.total(passes.values()) for layer in range(L) for passes in _module(way, mode, w, layer, L, N, D, F, K, C)
    )
    return modules + costs.adam_update(CLTSize.of_mlps(L, D, F), w.number)


def _module(way: Way, mode: Mode, w: Widths, layer: int, L: int, *sizes: int) -> list[Passes]:
    """Encode and decode of one layer's module, in every mode of a step."""
    N, D, F, K, C = sizes
    read = {"C": C, "U": layer * F, "S": layer * K}
    if way == "dense":
        vanilla, write = encode(w, N, D, F, K), decode(w, N, D, F, K, L - layer)
    else:
        vanilla, write = costs.topk_encode(w, N, D, F, K), costs.sparse_decode(w, N, D, F, K, L - layer)
    if mode == "vanilla":
        return [vanilla, write]
    if mode == "residual" or layer == 0:
        return [vanilla, write] * 2
    connected_encode = connected if way == "dense" else our_connected
    return [vanilla, write, connected_encode(w, N, D, F, K, **read), write]
