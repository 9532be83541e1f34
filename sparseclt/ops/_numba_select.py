"""Kernels of the numba backend that select: each row keeps a list of its k largest numbers and is shown one tile of
columns after another.

A block of columns in which nothing beats the least of the list costs one vector comparison. Of the first tile most
columns would enter an empty list; a bound that little more than k of them are above is bisected for it, and those are
sorted at once: each number's place is the count of those above it. Of F numbers in random order about k log(F / k) more
enter in later tiles; a few of them are put in one by one, where finding a number's place and shifting those below it,
both in vector lanes, takes less time than the chain of comparisons in a heap does. Exact: NaN counts as the largest,
and as columns come in rising order, a number goes below its equals, so that ties go to the lowest index.

Lists are rows of `values` and `indices` [N, k], ascending, filled from the end: `counts` [N]. With `absolute`, they
hold absolute values, and index i of a negative number as ~i.
"""

import numpy as np

from sparseclt.ops._numba_compile import SUMS, kernel

BLOCK = 32  # columns that are compared together
FEW = 3  # groups of columns for each of the k, from whose largest numbers a bound is found
BISECTIONS = 8
LANES = 32  # numbers that are compared side by side
EMPTY = np.iinfo(np.int64).min
MANY = 8  # numbers that are sorted and merged into a list rather than put into it one by one


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
def _bound_of_k(row, bias, absolute, bound, most):
    """A number, at least `bound`, that k = len(most) / FEW of a row are above, and few more: bisected between `bound`
    and the largest by counting, of a few columns at a time, the largest. `most` is overwritten; NaN does not count."""
    groups, k = len(most), len(most) // FEW
    most[:] = bound
    for begin in range(0, len(row) - groups + 1, groups):
        block, part = row[begin : begin + groups], bias[begin : begin + groups]
        if absolute:
            for g in range(groups):
                value = abs(block[g] + part[g])
                most[g] = value if value > most[g] else most[g]
        else:
            for g in range(groups):
                value = block[g] + part[g]
                most[g] = value if value > most[g] else most[g]
    top = bound
    for g in range(groups):
        top = max(top, most[g])
    for _ in range(BISECTIONS):
        middle = bound + (top - bound) / 2
        above = 0
        for g in range(groups):
            above += most[g] > middle
        if above >= k:
            bound = middle
        else:
            top = middle
    return bound


@kernel()
def _collect(row, bias, offset, absolute, bound, found_values, found):
    """Columns above `bound`, or NaN, in rising order, as they stand in the lists: how many, and whether NaN."""
    count = 0
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
        if absolute:  # without a branch that nobody can foresee
            for f in range(len(block)):
                found[count] = begin + f
                count += not (abs(block[f] + part[f]) <= bound)
        else:
            for f in range(len(block)):
                found[count] = begin + f
                count += not (block[f] + part[f] <= bound)
    any_nan = False
    for i in range(count):
        signed, index = row[found[i]] + bias[found[i]], offset + found[i]
        found_values[i] = abs(signed) if absolute else signed
        found[i] = ~index if absolute and signed < 0 else index
        any_nan |= signed != signed
    return count, any_nan


@kernel(SUMS)
def _count_above(values, value):
    """How many of the values, none of which is NaN, are larger; counted in their own type, for lanes as wide."""
    count, zero, one = values.dtype.type(0), values.dtype.type(0), values.dtype.type(1)
    for i in range(len(values)):
        count += one if values[i] > value else zero
    return int(count)


@kernel()
def _sort(found_values, found, many, best_values, best):
    """The largest numbers found, in falling order, those of equal size as they come: how many have room."""
    k, padded = len(best), (many + LANES - 1) // LANES * LANES
    found_values[many:padded] = -np.inf
    best[:] = EMPTY
    for i in range(many):
        place = _count_above(found_values[:padded], found_values[i])
        while place < k and best[place] != EMPTY:
            place += 1
        if place < k:
            best_values[place], best[place] = found_values[i], found[i]
    return min(many, k)


@kernel()
def _merge(values, indices, count, best_values, best, many):
    """Put `many` sorted numbers into the list, below their equals. The new count."""
    k, total = len(values), min(len(values), count + many)
    old, new = count - 1, many - 1  # the least ones
    for _ in range(count + many - total):  # for which there is no room
        if new >= 0 and (old < 0 or best_values[new] <= values[k - 1 - old]):
            new -= 1
        else:
            old -= 1
    for place in range(k - total, k):  # those of the list never move up
        if new >= 0 and (old < 0 or best_values[new] <= values[k - 1 - old]):
            values[place], indices[place] = best_values[new], best[new]
            new -= 1
        else:
            values[place], indices[place] = values[k - 1 - old], indices[k - 1 - old]
            old -= 1
    return total


@kernel()
def _take(row, bias, offset, absolute, floor, values, indices, count, most, found_values, found, best_values, best):
    """Show a list the columns offset.. of its row; only what is above `floor`, or NaN, may enter. The new count."""
    k, bound = len(values), row.dtype.type(floor)
    if offset == 0:
        values[:] = -np.inf
    if count == k:
        bound = values[0]
    elif count == 0 and len(row) >= 2 * len(most):  # numbers that would soon be driven out again stay out
        bound = _bound_of_k(row, bias, absolute, bound, most)
    many, any_nan = _collect(row, bias, offset, absolute, bound, found_values, found)
    if MANY <= many <= 4 * k and not any_nan and values[k - 1] == values[k - 1]:
        return _merge(values, indices, count, best_values, best, _sort(found_values, found, many, best_values, best))
    for i in range(many):
        if count == k and (bound != bound or found_values[i] <= bound):  # a list full of NaN lets nothing enter
            continue
        _insert(values, indices, found_values[i], found[i])
        count = min(k, count + 1)
        if count == k:
            bound = values[0]
    return count


@kernel()
def take_encoded(start, stop, pre, offset, bias, absolute, values, indices, counts):
    """Show rows start..stop of a tile of `x @ W.T`: bias [F] comes on top."""
    part, k = bias[offset : offset + pre.shape[1]], values.shape[1]
    found_values, found = np.empty(pre.shape[1] + LANES, dtype=pre.dtype), np.empty(pre.shape[1] + 1, dtype=np.int64)
    best_values, best, most = np.empty(k, pre.dtype), np.empty(k, np.int64), np.empty(FEW * k, pre.dtype)
    for n in range(start, stop):
        room = most, found_values, found, best_values, best
        counts[n] = _take(pre[n], part, offset, absolute, 0.0, values[n], indices[n], counts[n], *room)


@kernel()
def take_scored(start, stop, scores, offset, values, indices, counts):
    """Show rows of a tile of scores as they are."""
    none, k = np.zeros(scores.shape[1], dtype=scores.dtype), values.shape[1]
    found_values, found = np.empty(len(none) + LANES, dtype=scores.dtype), np.empty(len(none) + 1, dtype=np.int64)
    best_values, best, most = np.empty(k, none.dtype), np.empty(k, np.int64), np.empty(FEW * k, none.dtype)
    for n in range(start, stop):
        room = most, found_values, found, best_values, best
        counts[n] = _take(scores[n], none, offset, False, -np.inf, values[n], indices[n], counts[n], *room)


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
