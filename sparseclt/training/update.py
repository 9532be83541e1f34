"""One optimiser step from the gathered gradients of a CLT: their norm, to which they are clipped, and the update."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from sparseclt.model.decoder_gradients import Chunk, DecoderGradients
from sparseclt.model.transcoders import Transcoders
from sparseclt.training.optimizer import RowAdam

ROUNDING = 0.999  # by how much a bound of the norm has to stay below what it is compared with
KEPT_BYTES = 256 << 20  # decoder gradients that are kept for the update; larger ones are computed again for it


@dataclass
class InOnePass:
    """A decoder's gradient that is gathered and used for the update in one pass; `gradient` as
    `DecoderGradients.gathered` gives it."""

    optimizer: RowAdam
    name: str
    gradient: Any

    def square_sum(self) -> Tensor:
        return self._in_adams_units(self.gradient.squares())

    def most_square_sum(self) -> Tensor:
        """No less than that, without a gather."""
        return self._in_adams_units(self.gradient.most_squares())

    def update(self, learning_rate: float, factor: float) -> Tensor:
        """Returns the sum of squares; 0 if the gradient was kept."""
        return self._in_adams_units(self.optimizer.update_gathered(self.name, self.gradient, learning_rate, factor))

    def _in_adams_units(self, squares: Tensor) -> Tensor:
        return self.optimizer.square_sum_of_targets(self.name, squares)


@dataclass
class InChunks:
    """A decoder's gradient some rows at a time, which are kept for the update, or made again for it."""

    optimizer: RowAdam
    name: str
    gradients: DecoderGradients
    index: int
    keep: bool
    kept: list[Chunk] = field(default_factory=list)

    def square_sum(self) -> Tensor:
        if not self.keep:
            return self.optimizer.square_sum_of_targets(self.name, self.gradients.squares(self.index))
        self.kept = list(self.gradients.chunks(self.index))
        return torch.stack([self.optimizer.square_sum(self.name, chunk.gradient) for chunk in self.kept]).sum()

    def update(self, learning_rate: float, factor: float) -> None:
        for chunk in self.kept if self.keep else self.gradients.chunks(self.index):
            self.optimizer.update(self.name, chunk.gradient, learning_rate, chunk.rows, chunk.touched, factor)
        self.kept.clear()


@torch.no_grad()
def clip_and_step(
    clt: Transcoders,
    gradients: DecoderGradients,
    optimizer: RowAdam,
    learning_rate: float,
    clip: float | None,
    settle: Callable[[Tensor], float] = float,
) -> tuple[Tensor, str | None]:
    """Take one optimiser step. Returns the norm of the gradients in Adam's units, and the name of the first parameter
    whose gradient is not finite (then nothing was updated).

    The norm that `clip` bounds is that of the whole gradient, exactly. Decoders that are large are not kept for the
    update, but computed again, unless a cheap upper bound shows that nothing is to be clipped: then their norm is a
    by-product. Encoders and biases come last, for the gradient of decoders is made of encoder rows. `settle` reads a
    norm, which waits for the device: once, and a second time where the bound shows nothing.
    """
    add_up(clt)
    gradients.add_to_encoders()
    decoders, parameters = _decoders(clt, gradients, optimizer), optimizer.parameters
    others = {name: p.grad for name, p in parameters.items() if p.grad is not None and name not in decoders}
    known = {name: optimizer.square_sum(name, gradient) for name, gradient in others.items()}
    clip, factor, by_the_way = math.inf if clip is None else clip, 1.0, False
    once = [decoder for decoder in decoders.values() if isinstance(decoder, InOnePass) and not decoder.gradient.keep]
    if len(once) == len(decoders):
        totals = _totals(clt, known | {decoder.name: decoder.most_square_sum() for decoder in once})
        by_the_way = settle(_norm(totals)) < clip * ROUNDING
    if not by_the_way:
        known |= {name: decoder.square_sum() for name, decoder in decoders.items()}
        totals = _totals(clt, known)
        length = settle(_norm(totals))
        if not math.isfinite(length):
            spoiled = {name for name, total in zip(known, totals, strict=True) if not total.isfinite()}
            return _norm(totals), next(name for name in parameters if name in spoiled)
        factor = min(1.0, clip / (length + 1e-6))
    optimizer.step += 1
    if by_the_way:
        totals = _totals(clt, known | {decoder.name: decoder.update(learning_rate, factor) for decoder in once})
    else:
        for decoder in decoders.values():
            decoder.update(learning_rate, factor)
    for name, gradient in others.items():
        optimizer.update(name, gradient, learning_rate, factor=factor)
    for parameter in parameters.values():
        parameter.grad = None
    return _norm(totals), None


def _totals(clt: Transcoders, squares: dict[str, Tensor]) -> Tensor:
    """The sums of squares of parameters, of which ranks may have parts; in float64."""
    wide = reduce(torch.promote_types, (square.dtype for square in squares.values()))
    totals = torch.stack([square.to(wide) for square in squares.values()]).to(torch.float64)
    if clt.ranks.latents.rank:
        totals *= torch.tensor([not name.endswith("b_dec") for name in squares], device=totals.device)  # counted once
    return clt.ranks.latents.sum_(totals)


def _norm(totals: Tensor) -> Tensor:
    return totals.sum().sqrt()


def _decoders(clt: Transcoders, gradients: DecoderGradients, optimizer: RowAdam) -> dict[str, InOnePass | InChunks]:
    """The gradients of all decoders, by the parameter's name."""
    names = [f"transcoders.{index}.W_dec" for index in range(len(clt.sites))]
    keep = sum(optimizer.parameters[name].numel() for name in names) * 4 <= KEPT_BYTES
    found: dict[str, InOnePass | InChunks] = {}
    for index, name in enumerate(names):
        gathered = gradients.gathered(index) if optimizer.in_one_pass(name) else None
        if gathered is None:
            found[name] = InChunks(optimizer, name, gradients, index, keep)
        else:
            gathered.keep = keep
            found[name] = InOnePass(optimizer, name, gathered)
    return found


def add_up(clt: Transcoders) -> None:
    """Of every parameter but the decoders, the gradient of the whole batch in `.grad`, of which a rank has a part."""
    for name, parameter in clt.named_parameters():
        if parameter.grad is not None:
            group = clt.ranks.world if name.endswith("b_dec") else clt.ranks.data
            parameter.grad = group.sum_(parameter.grad)
