"""Kernels of the numba backend that select: each row keeps a list of its k largest numbers and is shown one tile of
columns after another.

A block of columns in which nothing beats the least of the list costs one vector comparison, and hardly any does: of F
numbers in random order about k (1 + log(F / k)) enter. For the k that transcoders have, finding a number's place and
shifting those below it, both in vector lanes, takes less time than the chain of comparisons in a heap does. Exact: NaN
counts as the largest, and as columns come in rising order, a number goes below its equals, so that ties go to the
lowest index.

Lists are rows of `values` and `indices` [N, k], ascending, filled from the end: `counts` [N]. With `absolute`, they
hold absolute values, and index i of a negative number as ~i.
"""

import numpy as np

from sparseclt.ops._numba_compile import SUMS, kernel

BLOCK = 64  # columns that are compared together
FEW = 4  # columns for each of the k: from there on a bound found beforehand pays


@kernel()
def _insert(values, indices, value, index):
    """Put a number into the list in place of its least one, which is smaller."""
    below = 0
    if value == value:
        for i in range(len(values)):
            below += values[i] < value
    else:
        for i in range(len(values)):
            below += values[i] == values[i]
    for i in range(below - 1):
        values[i] = values[i + 1]
    for i in range(below - 1):
        indices[i] = indices[i + 1]
    values[below - 1], indices[below - 1] = value, index


@kernel()
def _just_below_k(row, bias, absolute, best):
    """A number that at least k of a row are above: just below the least of the largest of k groups. `best` [k] is
    overwritten."""
    k = len(best)
    best[:] = -np.inf
    for begin in range(0, len(row) - k + 1, k):
        block, part = row[begin : begin + k], bias[begin : begin + k]
        for f in range(k):
            value = block[f] + part[f]
            value = abs(value) if absolute else value
            best[f] = value if value > best[f] else best[f]
    return np.nextafter(best.min(), -best.dtype.type(np.inf))


@kernel()
def _take(row, bias, offset, absolute, floor, values, indices, count):
    """Show a list the columns offset.. of its row; only what is above `floor`, or NaN, may enter. The new count."""
    k, least = len(values), row.dtype.type(floor)
    if offset == 0:
        if len(row) >= FEW * k:  # numbers that would soon be driven out again stay out
            least = max(least, _just_below_k(row, bias, absolute, values))
        values[:] = -np.inf
    bound = values[0] if count == k else least
    for begin in range(0, len(row), BLOCK):
        block, part = row[begin : begin + BLOCK], bias[begin : begin + BLOCK]
        any_above = False
        if absolute:
            for f in range(len(block)):
                any_above |= not (abs(block[f] + part[f]) <= bound)
        else:
            for f in range(len(block)):
                any_above |= not (block[f] + part[f] <= bound)
        if not any_above:
            continue
        for f in range(len(block)):
            signed = block[f] + part[f]
            value = abs(signed) if absolute else signed
            if value <= bound:
                continue
            index = offset + begin + f
            if absolute and signed < 0:
                index = ~index
            if count == k and bound != bound:  # a list full of NaN lets nothing enter
                break
            _insert(values, indices, value, index)
            count = min(k, count + 1)
            if count == k:
                bound = values[0]
    return count


@kernel()
def take_encoded(start, stop, pre, offset, bias, absolute, values, indices, counts):
    """Show rows start..stop of a tile of `x @ W.T`: bias [F] comes on top."""
    part = bias[offset : offset + pre.shape[1]]
    for n in range(start, stop):
        counts[n] = _take(pre[n], part, offset, absolute, 0.0, values[n], indices[n], counts[n])


@kernel()
def take_scored(start, stop, scores, offset, values, indices, counts):
    """Show rows of a tile of scores as they are."""
    none = np.zeros(scores.shape[1], dtype=scores.dtype)
    for n in range(start, stop):
        counts[n] = _take(scores[n], none, offset, False, -np.inf, values[n], indices[n], counts[n])


@kernel(SUMS)
def add_upstream(start, stop, pre, offset, z_values, z_indices, weights, latents, starts, cursors, scale):
    """Rows of a tile of `r0 @ W.T` plus the upstream part, over the scale [N].

    `weights` `latents` [F*C] lie in the order of upstream latents; `cursors` [N, S]: how far each slot's list has
    been walked, since latents rise in it and tiles come in rising order.
    """
    for n in range(start, stop):
        row = pre[n]
        end = offset + len(row)
        for s in range(z_indices.shape[1]):
            j, z = z_indices[n, s], z_values[n, s]
            if j >= 0:
                last = starts[j + 2] if j + 2 < len(starts) else len(latents)
                p = starts[j + 1] if offset == 0 else cursors[n, s]
                while p < last and latents[p] < end:
                    row[latents[p] - offset] += z * weights[p]
                    p += 1
                cursors[n, s] = p
        divisor = scale[n]
        for f in range(len(row)):
            row[f] /= divisor


@kernel()
def finish(start, stop, values, indices, counts):
    """Lists into rows in descending order, with the first latents that are not among them at value 0 for a rest."""
    k = values.shape[1]
    for n in range(start, stop):
        row, ids, count = values[n], indices[n], counts[n]
        for slot in range(k // 2):
            other = k - 1 - slot
            row[slot], row[other] = row[other], row[slot]
            ids[slot], ids[other] = ids[other], ids[slot]
        for slot in range(count):
            if ids[slot] < 0:
                row[slot], ids[slot] = -row[slot], ~ids[slot]
        candidate = 0
        for slot in range(count, k):
            taken = True
            while taken:
                taken = False
                for other in range(count):
                    taken |= ids[other] == candidate
                candidate += 1
            row[slot], ids[slot] = 0, candidate - 1
