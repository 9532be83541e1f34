"""The numba backend's optimiser step: Adam in one pass over a parameter, a decoder's with a gathered gradient.

A decoder's gradient is a sum of gathered vectors. That of a large one is made twice, one vector [D] at a time: for the
sum of its squares, by which gradients are clipped, and for the step. One target's vectors are gathered at a time, as
those of all targets are larger than the caches.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sparseclt.ops._numba import transpose, transposed_gather_sum
from sparseclt.ops._numba_compile import SUMS, kernel, run
from sparseclt.ops._optimizer_step import Adam, Read, Written


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
        (F, T, D), slots = self.shape, self._sorted()
        squares = slots[0].new_empty(T, F)
        self.kept = slots[0].new_empty(F if self.keep else 0, T, D)
        for target, behind in self._targets():
            read = *slots, self._bag(target), behind
            run(decoder_squares, F, self._work, *read, target, self.kept, squares[target])
        self.slots = None if self.keep else slots
        return squares.sum(1)

    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        """The slots of all passes by latent: their values, their tokens, and where each latent's start."""
        values = torch.cat([w.values for w in self.written])
        by_latent = transpose(torch.cat([w.indices for w in self.written]), self.shape[0])
        tokens = by_latent.order // values.shape[1]
        return values.flatten().index_select(0, by_latent.order), tokens, by_latent.starts

    def adam(self, weights: Tensor, mean: Tensor, square: Tensor, steps: Sequence[Adam]) -> None:
        """Adam on `weights` [F, T, D] with moments `mean` and `square`, in place; one of `steps` for each target."""
        if self.keep:
            for target, step in enumerate(steps):
                updated = weights, mean, square
                run(kept_adam, self.shape[0], self._work, self.kept, target, _numbers(step, weights), *updated)
            return
        assert self.slots is not None
        for target, behind in self._targets():
            read = *self.slots, self._bag(target), behind, target, _numbers(steps[target], weights)
            run(decoder_adam, self.shape[0], self._work, *read, weights, mean, square)

    @property
    def _work(self) -> int:
        F, _, D = self.shape
        return (sum(w.indices.numel() for w in self.written) + 10 * F) * D

    def _bag(self, target: int) -> Tensor:
        """The gradients of a target in all passes, one after another."""
        grads = [w.grads[target] for w in self.written]
        return grads[0].contiguous() if len(grads) == 1 else torch.cat(grads)

    def _targets(self) -> Iterator[tuple[int, Tensor]]:
        """Every target, the last one first, with what readers behind it read [F, D], or [0, D] of none."""
        _, T, D = self.shape
        behind = self.written[0].values.new_empty(0, D)
        for target in reversed(range(len(self.read))):
            if (reader := self.read[target]) is not None:
                total = transposed_gather_sum(reader.dV, *reader.by_upstream, reader.W_enc)
                total = total - total.mean(1, keepdim=True) if reader.centred else total
                behind = total if len(behind) == 0 else behind.add_(total)
            if target < T:
                yield target, behind


def _numbers(adam: Adam, like: Tensor) -> np.ndarray:
    """What the kernels read, in the dtype of the weights."""
    (beta1, beta2), steps = adam.betas, adam.step
    size, root = adam.learning_rate / (1 - beta1**steps), (1 - beta2**steps) ** 0.5
    numbers = adam.gain, 1 - beta1, beta2, 1 - beta2, -size, root, adam.epsilon, adam.scale
    return torch.tensor(numbers, dtype=like.dtype).numpy()


def adam_(weights: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, step: Adam) -> None:
    """Adam on contiguous tensors of any one shape, in place."""
    flat = [tensor.view(-1) for tensor in (weights, gradient, mean, square)]
    run(adam, len(flat[0]), 10 * len(flat[0]), *flat, _numbers(step, weights))


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
def _gradient(r, slots, tokens, starts, bags, behind, out):
    """Row r of the gradient [D]: of its slots, their weights x the bags of their tokens, plus what is read behind."""
    if len(behind) > 0:
        out[:] = behind[r]
    else:
        out[:] = 0
    first, last = starts[r + 1], starts[r + 2] if r + 2 < len(starts) else len(slots)
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
def decoder_squares(start, stop, slots, tokens, starts, bags, behind, target, kept, squares):
    """squares[r] = the sum of squares of row r's gradient, which goes to kept [F, T, D], if that has any rows."""
    row = np.empty(bags.shape[1], dtype=bags.dtype)
    for r in range(start, stop):
        out = kept[r, target] if len(kept) > 0 else row
        _gradient(r, slots, tokens, starts, bags, behind, out)
        total = row.dtype.type(0)
        for x in range(len(out)):
            total += out[x] * out[x]
        squares[r] = total


@kernel(SUMS)
def kept_adam(start, stop, kept, target, numbers, weights, mean, square):
    """Adam on rows [r, target] of weights [F, T, D], with the gradient that `decoder_squares` kept."""
    for r in range(start, stop):
        _adam(weights[r, target], kept[r, target], mean[r, target], square[r, target], numbers)


@kernel(SUMS)
def decoder_adam(start, stop, slots, tokens, starts, bags, behind, target, numbers, weights, mean, square):
    """Adam on rows [r, target] of weights [F, T, D]."""
    row = np.empty(bags.shape[1], dtype=bags.dtype)
    for r in range(start, stop):
        _gradient(r, slots, tokens, starts, bags, behind, row)
        _adam(weights[r, target], row, mean[r, target], square[r, target], numbers)
