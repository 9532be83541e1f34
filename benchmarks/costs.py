"""Work by formula: floating-point operations, and bytes that must move at least once.

A way is "sparse" (ours, and what gathers rows as ours does) or "dense". Rows that are gathered count once for each
time they are named; scratch that fits in a cache counts nothing. Letters as in the ops: N tokens, D d_model, F
latents, K active latents, C connections, U upstream latents, S active upstream slots, T targets, L layers.
"""

from dataclasses import dataclass

INDEX = 8  # bytes of an int64


@dataclass(frozen=True)
class Cost:
    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> "Cost":
        return Cost(self.flops * times, self.bytes * times)


def gemm(rows: float, columns: float, inner: float, s: int) -> Cost:
    return Cost(2 * rows * columns * inner, s * (rows * inner + columns * inner + rows * columns))


def decode(way: str, backward: bool, s: int, N: int, D: int, F: int, K: int, T: int = 1, **_: int) -> Cost:
    D *= T
    if way == "dense":
        product = gemm(N, D, F, s) + Cost(0, s * N * F)  # z is filled with zeros first
        return product * 2 if backward else product
    slots = (s + INDEX) * N * K
    if backward:
        return Cost(4 * N * K * D, s * (2 * N * K * D + N * D + F * D + N * K) + slots)
    return Cost(2 * N * K * D, s * (N * K * D + N * D) + slots)


def encode(way: str, backward: bool, s: int, N: int, D: int, F: int, K: int, **_: int) -> Cost:
    if way == "dense":
        product = gemm(N, F, D, s)
        return product * 2 + Cost(0, 3 * s * N * F) if backward else product + Cost(0, 3 * s * N * F)
    slots = (s + INDEX) * N * K
    if backward:
        return Cost(4 * N * K * D, s * (2 * N * K * D + N * D + F * D) + slots)
    return Cost(2 * N * F * D, s * (N * D + F * D) + slots)


def weights(way: str, backward: bool, s: int, D: int, F: int, C: int, U: int, **_: int) -> Cost:
    if way == "dense":
        return gemm(F, U, D, s) * (2 if backward else 1) + Cost(0, s * F * U)
    if backward:
        return Cost(4 * F * C * D, s * (2 * F * C * D + F * D + U * D) + INDEX * 2 * F * C)
    return Cost(2 * F * C * D, s * (F * C * D + F * D) + (s + INDEX) * F * C)


def matmul(way: str, backward: bool, s: int, N: int, F: int, C: int, U: int, S: int, **_: int) -> Cost:
    """Sparse: each active upstream latent walks its F C / U out-connections on average."""
    if way == "dense":
        return (gemm(N, F, U, s) + Cost(0, s * (N * U + F * U))) * (2 if backward else 1)
    pairs = N * S * F * C / U
    if backward:
        return Cost(4 * pairs, s * (N * F + 2 * pairs + F * C) + INDEX * pairs)
    return Cost(2 * pairs, s * (N * F + 2 * pairs) + INDEX * pairs)


def virtual(way: str, backward: bool, s: int, **sizes: int) -> Cost:
    mask = Cost(0, 2 * s * sizes["F"] * sizes["U"]) if way == "dense" else Cost()
    return weights(way, backward, s, **sizes) + matmul(way, backward, s, **sizes) + mask


def connected(way: str, backward: bool, s: int, **sizes: int) -> Cost:
    """With the virtual weights that it reads."""
    if way == "sparse" and backward:  # connections of the K selected latents of a token alone
        pairs = sizes["N"] * sizes["K"] * sizes["C"]
        upstream = Cost(4 * pairs, (3 * s + INDEX) * pairs) + weights(way, backward, s, **sizes)
        return encode(way, backward, s, **sizes) + upstream
    return encode(way, backward, s, **sizes) + virtual(way, backward, s, **sizes)


def select(way: str, backward: bool, s: int, D: int, F: int, C: int, U: int, **_: int) -> Cost:
    matrix = Cost(0, 5 * s * F * U) if way == "dense" else Cost()
    return Cost(2 * F * U * D, s * (F * D + U * D) + INDEX * F * C) + matrix


def parameters(L: int, D: int, F: int, **_: int) -> int:
    """Of a CLT: encoders, and L(L+1)/2 decoders."""
    return L * F * (D + 1) + L * (L + 1) // 2 * F * D + L * D


def optimizer(s: int, **sizes: int) -> Cost:
    """Adam: parameters and two moments read and written, gradients read."""
    return Cost(12 * parameters(**sizes), 7 * s * parameters(**sizes))


def step(way: str, mode: str, s: int, **sizes: int) -> Cost:
    """A training step: both passes of every encoder and decoder, virtual weights of every pair of layers, Adam.

    `way` "floor": the encode GEMMs of the vanilla pass alone. `mode` "residual": no virtual weights.
    """
    L = sizes["L"]
    rest = {name: size for name, size in sizes.items() if name != "L"}
    total = Cost()
    for layer in range(L):
        if way == "floor":
            total += gemm(sizes["N"], sizes["F"], sizes["D"], s)
            continue
        for backward in (False, True):
            module = encode(way, backward, s, **rest) + decode(way, backward, s, **rest, T=L - layer)
            total += module * (1 if mode == "vanilla" else 2)
            if mode == "both" and layer:
                total += virtual(way, backward, s, **rest, U=layer * sizes["F"], S=layer * sizes["K"])
    return total if way == "floor" else total + optimizer(s, **sizes)


def state_bytes(s: int, **sizes: int) -> int:
    """What every contender of a step holds: parameters, gradients and Adam's two moments."""
    return 4 * s * parameters(**sizes)


def dense_step_bytes(mode: str, s: int, L: int, N: int, D: int, F: int, **_: int) -> float:
    """Peak memory of the dense baseline's step: the states; relu's result and z of every encoder, kept for the
    backward pass; and, in both modes, the masks, and every virtual weight before and after masking."""
    modes = 1 if mode == "vanilla" else 2
    activations = modes * L * N * F * s * 2 + 2 * N * F * s
    pairs = L * (L - 1) / 2 * F * F * s if mode == "both" else 0
    return state_bytes(s, L=L, D=D, F=F) + activations + 3 * pairs
