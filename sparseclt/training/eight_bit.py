"""Adam's moments in one byte a number, with one scale for each vector [D].

A code q stands for scale (q / levels)^power: with power 2 for the mean and 4 for the square (whose root Adam divides
by), both reach from the vector's largest entry down over four orders of magnitude, with the same relative precision.
Moments move by less than a code's width in most steps, so they must not be rounded to the nearest: codes are rounded
down after adding an offset in [0, 1) that runs through that interval evenly from step to step (multiples of the golden
ratio, another for each column). On average over steps nothing is lost, with less noise than random numbers would bring.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparseclt.parallel import ALONE, Group


class Code(NamedTuple):
    """How numbers become codes. `least`: of a vector with any entry, so that no step divides by zero."""

    dtype: torch.dtype
    levels: int
    roots: int  # square roots from number to code
    least: int = 0


MEAN, SQUARE = Code(torch.int8, 127, 1), Code(torch.uint8, 255, 2, least=1)


def decode(code: Code, codes: Tensor, scale: Tensor) -> Tensor:
    """Numbers [..., D] of `codes` [..., D] and `scale` [...], in the scale's dtype."""
    exact = codes.to(scale.dtype).div_(code.levels)
    if code.roots == 1:
        return exact.mul_(exact.abs()).mul_(scale[..., None])
    return exact.square_().square_().mul_(scale[..., None])


def encode(code: Code, exact: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, group: Group = ALONE) -> None:
    """The reverse, into `codes` and `scale`; `offset` [D] as `offsets` gives it. `exact` is overwritten. `group`: the
    ranks that have the other columns of the same vectors."""
    signs = exact.sign() if code.least == 0 else None
    torch.amax(exact.abs_(), -1, out=scale)
    group.max_(scale)
    exact.div_(scale.clamp_min(torch.finfo(exact.dtype).tiny)[..., None])
    for _ in range(code.roots):
        exact.sqrt_()
    exact.mul_(code.levels).add_(offset).floor_().clamp_(code.least, code.levels)
    codes.copy_(exact.mul_(signs) if signs is not None else exact)


def offsets(columns: int, step: int, device: torch.device) -> Tensor:
    """[columns] float32 in [0, 1): what codes are rounded with in a step."""
    steps = torch.arange(columns, dtype=torch.float64, device=device).mul_(0.7548776662466927)
    return steps.add_(step * 0.6180339887498949).frac_().to(torch.float32).clamp_max_(1 - 2**-20)
