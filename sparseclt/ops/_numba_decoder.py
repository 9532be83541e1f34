"""The numba backend's optimiser step: Adam in one pass over a parameter, a decoder's with a gathered gradient.

A decoder's gradient is a sum of gathered vectors. That of a large one is never whole. For the step it is made for some
latents at a time. Clipping needs the sum of its squares before that, for which it is made one vector [D] at a time,
unless a bound of the sum shows that nothing is clipped.
One target's vectors are gathered at a time, as those of all targets are larger than the caches. Weights and moments,
of which a target's lie far apart, are read in their order in memory.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sparseclt.ops import _huge_pages
from sparseclt.ops._numba import transpose, transposed_gather_sum
from sparseclt.ops._numba_compile import SUMS, kernel, run
from sparseclt.ops._optimizer_step import Adam, Read, Written
from sparseclt.ops._torch_rows import Transpose, chunks
from sparseclt.ops.scratch import UPDATE_BYTES


class Decoder:
    """The gradient of a decoder `shape` [F, T, D], `written` by the passes; `read`: by target, the reader that meets
    the sum up to that target, or None.

    With `keep`, `squares` stores the gradient for `adam`: of small decoders, that takes less time than to gather it
    twice."""

    def __init__(self, shape: tuple[int, int, int], written: Sequence[Written], read: Sequence[Read | None]):
        self.shape, self.read, self.written = shape, read, written
        self.keep = False

    def squares(self) -> Tensor:
        """[T]: the sum of squares of each target's gradient."""
        F, T, D = self.shape
        squares = self.slots[0].new_empty(T, F)
        self.kept = self.slots[0].new_empty(F if self.keep else 0, T, D)
        for target, behind in self._targets(slice(0, F)):
            read = *self.slots, self._bag(target), behind
            run(decoder_rows, F, self._work, *read, target, self.kept, squares[target])
        if self.keep:
            del self.slots
        return squares.sum(1)

    def most_squares(self) -> Tensor:
        """[T]: no less than `squares()`, without a gather; inf where anything is read.

        By Cauchy and Schwarz, the squares of a sum of n vectors are at most n times the sum of their squares."""
        total = self.written[0].values.new_zeros(self.shape[1])
        if any(self.read):
            return total.fill_(torch.inf)
        times = Transpose(*self.slots[1:]).bounds().diff().to(total.dtype)
        for values, indices, grads in self.written:
            weights = (values.square() * times[indices.clamp_min(0)]).sum(1)
            total += torch.stack([torch.linalg.vecdot(grad, grad) @ weights for grad in grads])
        return total

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of all passes by latent: their values, their tokens, and where each latent's start."""
        values = torch.cat([w.values for w in self.written])
        by_latent = transpose(torch.cat([w.indices for w in self.written]), self.shape[0])
        tokens = by_latent.order // values.shape[1]
        return values.flatten().index_select(0, by_latent.order), tokens, by_latent.starts

    def adam(self, weights: Tensor, mean: Tensor, square: Tensor, steps: Sequence[Adam]) -> Tensor:
        """Adam on `weights` [F, T, D] with moments `mean` and `square`, in place; one of `steps` for each target.
        Returns what `squares` does; with `keep`, where that has been called before, zeros."""
        numbers = np.stack([_numbers(step, weights) for step in steps])
        squares = weights.new_empty(len(steps), 0 if self.keep else len(weights))
        for rows, gradient in [(slice(None), self.kept)] if self.keep else self._chunks(squares):
            updated = weights[rows], mean[rows], square[rows]
            run(adam_by_target, len(gradient), 10 * gradient.numel(), gradient, numbers, *updated)
        return squares.sum(1)

    def _chunks(self, squares: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The gradient [rows, T, D], some latents at a time, each chunk in the memory of the one before; and `squares`
        [T, F] of each target's."""
        (F, T, D), (values, *by_latent) = self.shape, self.slots
        each, bags = T * D * values.element_size(), [self._bag(target) for target in range(T)]
        memory = _huge_pages.empty((min(F, max(1, UPDATE_BYTES // each)), T, D), values)
        for rows in chunks(F, each, UPDATE_BYTES):
            gradient, part = memory[: rows.stop - rows.start], _part(Transpose(*by_latent), rows)
            work = self._work * len(gradient) // F
            for target, behind in self._targets(rows):
                read = values, *part, bags[target], behind
                run(decoder_rows, len(gradient), work, *read, target, gradient, squares[target, rows])
            yield rows, gradient

    @property
    def _work(self) -> int:
        F, _, D = self.shape
        return (sum(w.indices.numel() for w in self.written) + 10 * F) * D

    def _bag(self, target: int) -> Tensor:
        """The gradients of a target in all passes, one after another."""
        grads = [w.grads[target] for w in self.written]
        return grads[0].contiguous() if len(grads) == 1 else torch.cat(grads)

    def _targets(self, rows: slice) -> Iterator[tuple[int, Tensor]]:
        """Every target, the last one first, with what readers behind it read of some latents [rows, D], or [0, D] of
        none."""
        _, T, D = self.shape
        behind = self.written[0].values.new_empty(0, D)
        for target in reversed(range(len(self.read))):
            if (reader := self.read[target]) is not None:
                total = transposed_gather_sum(reader.dV, *_part(reader.by_upstream, rows), reader.W_enc)
                total = total - total.mean(1, keepdim=True) if reader.centred else total
                behind = total if len(behind) == 0 else behind.add_(total)
            if target < T:
                yield target, behind


def _part(transposed: Transpose, rows: slice) -> Transpose:
    """The transpose of some of the rows: slots of the rows before them come first, as empty ones do."""
    order, starts = transposed
    last = int(starts[rows.stop + 1]) if rows.stop + 1 < len(starts) else len(order)
    return Transpose(order[:last], starts[rows.start : rows.stop + 1])


def _numbers(adam: Adam, like: Tensor) -> np.ndarray:
    """What the kernels read, in the dtype of the weights."""
    (beta1, beta2), steps = adam.betas, adam.step
    size, root = adam.learning_rate / (1 - beta1**steps), (1 - beta2**steps) ** 0.5
    numbers = adam.gain, 1 - beta1, beta2, 1 - beta2, -size, root, adam.epsilon, adam.scale
    return torch.tensor(numbers, dtype=like.dtype).numpy()


def adam_(weights: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Adam, rests: bool) -> None:
    """Adam on contiguous tensors of any one shape, in place. `rests`: not on rows whose gradient is zero."""
    tensors, numbers = (weights, gradient, mean, square), _numbers(step, weights)
    if rests:
        rows = [tensor.view(len(weights), -1) for tensor in tensors]
        run(adam_of_rows, len(weights), 10 * weights.numel(), *rows, numbers, _numbers(step._replace(scale=0), weights))
    else:
        run(adam, weights.numel(), 10 * weights.numel(), *[tensor.view(-1) for tensor in tensors], numbers)


@kernel(SUMS)
def _adam(weights, gradient, mean, square, numbers):
    """Adam on one vector, with the formulas of torch's fused one."""
    gain, rise, keep, rise_square, size, root, epsilon, scale = numbers
    for x in range(len(gradient)):
        g = gradient[x] * gain
        m = mean[x] + (g - mean[x]) * rise
        v = square[x] * keep + g * g * rise_square
        mean[x], square[x] = m, v
        weights[x] += size * m / (np.sqrt(v) / root + epsilon) * scale


@kernel(SUMS)
def adam(start, stop, weights, gradient, mean, square, numbers):
    """Entries start..stop."""
    part = slice(start, stop)
    _adam(weights[part], gradient[part], mean[part], square[part], numbers)


@kernel(SUMS)
def adam_of_rows(start, stop, weights, gradient, mean, square, numbers, resting):
    """Rows start..stop; with the numbers `resting` those whose gradient is zero."""
    for r in range(start, stop):
        moved = False
        for x in range(gradient.shape[1]):
            if gradient[r, x] != 0:
                moved = True
                break
        _adam(weights[r], gradient[r], mean[r], square[r], numbers if moved else resting)


@kernel(SUMS)
def _gradient(r, slots, tokens, starts, bags, behind, out):
    """Row r of the gradient [D]: of its slots, their weights x the bags of their tokens, plus what is read behind."""
    if len(behind) > 0:
        out[:] = behind[r]
    else:
        out[:] = 0
    first, last = starts[r + 1], starts[r + 2] if r + 2 < len(starts) else len(tokens)
    whole = first + (last - first) // 4 * 4
    for p in range(first, whole, 4):
        a, b, c, d = bags[tokens[p]], bags[tokens[p + 1]], bags[tokens[p + 2]], bags[tokens[p + 3]]
        w_a, w_b, w_c, w_d = slots[p], slots[p + 1], slots[p + 2], slots[p + 3]
        for x in range(len(out)):
            out[x] += w_a * a[x] + w_b * b[x] + w_c * c[x] + w_d * d[x]
    for p in range(whole, last):
        a, w_a = bags[tokens[p]], slots[p]
        for x in range(len(out)):
            out[x] += w_a * a[x]


@kernel(SUMS)
def decoder_rows(start, stop, slots, tokens, starts, bags, behind, target, gradient, squares):
    """squares[r] = the sum of squares of row r's gradient, which goes to gradient [R, T, D], if that has any rows."""
    row = np.empty(bags.shape[1], dtype=bags.dtype)
    for r in range(start, stop):
        out = gradient[r, target] if len(gradient) > 0 else row
        _gradient(r, slots, tokens, starts, bags, behind, out)
        total = row.dtype.type(0)
        for x in range(len(out)):
            total += out[x] * out[x]
        squares[r] = total


@kernel(SUMS)
def adam_by_target(start, stop, gradient, numbers, weights, mean, square):
    """Adam on rows [R, T, D], with the numbers of each target."""
    for r in range(start, stop):
        for t in range(len(numbers)):
            _adam(weights[r, t], gradient[r, t], mean[r, t], square[r, t], numbers[t])
