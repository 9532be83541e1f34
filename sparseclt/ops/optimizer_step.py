"""Adam in one pass over weights and moments, on the CPU: by the functions of the numba backend."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sparseclt.ops._optimizer_step import Adam, Read, Written
from sparseclt.ops.backend import choose

__all__ = ["Adam", "Read", "Written", "adam_", "gathered_decoder", "in_one_pass"]


def in_one_pass(weights: Tensor, backend: str | None = None) -> bool:
    """Whether the functions below take `weights` on `backend`, or on the one that is chosen for None."""
    return choose("adam_", backend, weights) == "numba"


def adam_(weights: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Adam, rests: bool = False) -> None:
    """One step of Adam, in place, on contiguous tensors of one shape and dtype; as `torch.optim.Adam` with moments
    `mean` and `square`, up to rounding. `rests`: rows (the first axis) whose gradient is zero stay where they are,
    while their moments decay."""
    from sparseclt.ops._numba_decoder import adam_ as run

    run(weights, gradient, mean, square, step, rests)


def gathered_decoder(
    shape: tuple[int, int, int],
    written: Sequence[Written],
    read: Sequence[Read | None],
) -> Any:
    """The gradient of a decoder `shape` [F, T, D]: it has `squares()` [T], a cheap `most_squares()` [T] that is no
    less, and `adam(weights, mean, square, steps)`, with one of `steps` for each target, which returns the squares, too.
    If its attribute `keep` is set, `squares` stores the gradient for `adam`, which then returns zeros.

    `written`: by at least one pass. `read`: by target, the reader that meets the sum up to that target, or None.
    """
    from sparseclt.ops._numba_decoder import Decoder

    return Decoder(shape, written, read)
