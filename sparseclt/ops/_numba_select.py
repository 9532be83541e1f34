"""Kernels of the numba backend that select: each row keeps a heap of its k largest numbers and is shown one tile of
columns after another.

A block of columns in which nothing beats the heap's smallest costs one vector comparison, and hardly any does: of F
numbers in random order about k (1 + log(F / k)) enter. Exact: NaN counts as the largest, and as columns come in
rising order, one that equals the smallest never enters, so that ties go to the lowest index.

Heaps are rows of `values` and `indices` [N, k], filled up to `counts` [N]. With `absolute`, they hold absolute
values, and index i of a negative number as ~i.
"""

import numpy as np

from sparseclt.ops._numba_compile import SUMS, kernel

BLOCK = 64


@kernel()
def _below(a, i, b, j):
    """Whether number a at index i comes after b at j: it is smaller, or equal at a higher index."""
    if a == b or (a != a and b != b):
        return (i if i >= 0 else ~i) > (j if j >= 0 else ~j)
    return (a < b) | (b != b)


@kernel()
def _sift_down(values, indices, count):
    """Restore the heap whose root is new."""
    value, index = values[0], indices[0]
    hole, child = 0, 1
    while child < count:
        if child + 1 < count:  # added, not branched upon: nobody can predict it
            child += _below(values[child + 1], indices[child + 1], values[child], indices[child])
        if not _below(values[child], indices[child], value, index):
            break
        values[hole], indices[hole] = values[child], indices[child]
        hole, child = child, 2 * child + 1
    values[hole], indices[hole] = value, index


@kernel()
def _sift_up(values, indices, last):
    """Restore the heap whose last element is new."""
    value, index = values[last], indices[last]
    hole = last
    while hole > 0 and _below(value, index, values[(hole - 1) // 2], indices[(hole - 1) // 2]):
        parent = (hole - 1) // 2
        values[hole], indices[hole] = values[parent], indices[parent]
        hole = parent
    values[hole], indices[hole] = value, index


@kernel()
def _take(row, bias, offset, absolute, floor, values, indices, count):
    """Show a heap the columns offset.. of its row; only what is above `floor`, or NaN, may enter. The new count."""
    k = len(values)
    bound = values[0] if count == k else row.dtype.type(floor)
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
            if count < k:
                values[count], indices[count] = value, index
                _sift_up(values, indices, count)
                count += 1
            elif bound == bound:  # above it, or NaN; a heap full of NaN lets nothing enter
                values[0], indices[0] = value, index
                _sift_down(values, indices, k)
            if count == k:
                bound = values[0]
    return count


@kernel()
def take_encoded(start, stop, pre, offset, bias, absolute, values, indices, counts):
    """Show rows start..stop of a tile of `x @ W.T`: bias [F] or [0] comes on top."""
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
    """Heaps into rows in descending order, with the first latents that are not among them at value 0 for a rest."""
    k = values.shape[1]
    for n in range(start, stop):
        row, ids, count = values[n], indices[n], counts[n]
        for last in range(count - 1, 0, -1):
            row[0], row[last] = row[last], row[0]
            ids[0], ids[last] = ids[last], ids[0]
            _sift_down(row, ids, last)
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
