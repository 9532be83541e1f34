"""Kernels of the numba backend for gathered rows and for virtual weights in the order of upstream latents (CSC).

`order` and `starts` are a `Transpose`: slots of indices [N, K] sorted by the row that they name, empty ones first;
row r's begin at starts[r + 1].
"""

import numpy as np

from sparseclt.ops._numba_compile import SUMS, kernel


@kernel(SUMS)
def row_dots(start, stop, bags, indices, rows, out):
    """out[n, k] = dot(bags[n], rows[indices[n, k]]), 0 for an empty slot. At least one row. Four at a time, so that
    their rows are fetched side by side."""
    zero, K = bags.dtype.type(0), indices.shape[1]
    for n in range(start, stop):
        bag, ids = bags[n], indices[n]
        for k in range(0, K, 4):
            i_a, i_b, i_c, i_d = ids[k], ids[min(k + 1, K - 1)], ids[min(k + 2, K - 1)], ids[min(k + 3, K - 1)]
            a, b, c, d = rows[max(i_a, 0)], rows[max(i_b, 0)], rows[max(i_c, 0)], rows[max(i_d, 0)]
            of_a, of_b, of_c, of_d = zero, zero, zero, zero
            for x in range(len(bag)):
                of_a += bag[x] * a[x]
                of_b += bag[x] * b[x]
                of_c += bag[x] * c[x]
                of_d += bag[x] * d[x]
            out[n, k] = of_a if i_a >= 0 else zero
            if k + 1 < K:
                out[n, k + 1] = of_b if i_b >= 0 else zero
            if k + 2 < K:
                out[n, k + 2] = of_c if i_c >= 0 else zero
            if k + 3 < K:
                out[n, k + 3] = of_d if i_d >= 0 else zero


@kernel(SUMS)
def _add_rows(weights, ids, rows, out):
    """out [D] = sum of weights [S] x the rows that ids [S] name. Four at a time, so that `out` is seldom touched."""
    S = len(ids)
    first = min(S, 2 - S % 2)  # one or two are written, the others added in pairs and fours
    if first == 0:
        out[:] = 0
    elif first == 1:
        a, w_a = rows[ids[0]], weights[0]
        for x in range(len(out)):
            out[x] = w_a * a[x]
    else:
        a, b, w_a, w_b = rows[ids[0]], rows[ids[1]], weights[0], weights[1]
        for x in range(len(out)):
            out[x] = w_a * a[x] + w_b * b[x]
    if (S - first) % 4 == 2:
        a, b, w_a, w_b = rows[ids[first]], rows[ids[first + 1]], weights[first], weights[first + 1]
        for x in range(len(out)):
            out[x] += w_a * a[x] + w_b * b[x]
        first += 2
    for s in range(first, S, 4):
        a, b, c, d = rows[ids[s]], rows[ids[s + 1]], rows[ids[s + 2]], rows[ids[s + 3]]
        w_a, w_b, w_c, w_d = weights[s], weights[s + 1], weights[s + 2], weights[s + 3]
        for x in range(len(out)):
            out[x] += w_a * a[x] + w_b * b[x] + w_c * c[x] + w_d * d[x]


@kernel(SUMS)
def gather_sum(start, stop, weights, indices, rows, out):
    """out[n] = sum of weights[n, k] x rows[indices[n, k]], without empty slots."""
    K = indices.shape[1]
    ids, few = np.empty(K, dtype=np.int64), np.empty(K, dtype=rows.dtype)
    for n in range(start, stop):
        filled = 0
        for k in range(K):
            if indices[n, k] >= 0:
                ids[filled], few[filled] = indices[n, k], weights[n, k]
                filled += 1
        _add_rows(few[:filled], ids[:filled], rows, out[n])


@kernel(SUMS)
def transposed_gather_sum(start, stop, weights, order, starts, bags, out):
    """out[r] = sum over the slots that name row r of their weight x their bag [D]. `weights` [N, K]."""
    flat, K = weights.reshape(-1), weights.shape[1]
    ids, few = np.empty(64, dtype=np.int64), np.empty(64, dtype=bags.dtype)
    for r in range(start, stop):
        last = starts[r + 2] if r + 2 < len(starts) else len(order)
        first = starts[r + 1]
        if last - first > len(ids):
            ids, few = np.empty(2 * (last - first), dtype=np.int64), np.empty(2 * (last - first), dtype=bags.dtype)
        for p in range(first, last):
            ids[p - first], few[p - first] = order[p] // K, flat[order[p]]
        _add_rows(few[: last - first], ids[: last - first], bags, out[r])


@kernel(SUMS)
def transposed_row_dots(start, stop, bags, order, starts, K, rows, out):
    """`row_dots` a row at a time, which reads each once, in order: out [N, K] keeps what stands in its empty slots."""
    flat = out.reshape(-1)
    for r in range(start, stop):
        last = starts[r + 2] if r + 2 < len(starts) else len(order)
        row = rows[r]
        for p in range(starts[r + 1], last):
            bag, total = bags[order[p] // K], bags.dtype.type(0)
            for x in range(len(row)):
                total += bag[x] * row[x]
            flat[order[p]] = total


@kernel()
def add_outer_products(start, stop, weights, order, starts, values, ids, total):
    """total[r] [U] += sum over the slots that name row r of their weight x the sparse row (values, ids) [S] of their
    bag: a row of the total stays in the cache while it grows."""
    flat, K = weights.reshape(-1), weights.shape[1]
    for r in range(start, stop):
        last = starts[r + 2] if r + 2 < len(starts) else len(order)
        row = total[r]
        for p in range(starts[r + 1], last):
            weight, bag, columns = flat[order[p]], values[order[p] // K], ids[order[p] // K]
            for s in range(len(columns)):
                if columns[s] >= 0:
                    row[columns[s]] += weight * bag[s]


@kernel()
def transpose(start, stop, flat, order, starts):
    """Counting sort, stable, of all indices [M] into order [M] and starts [R+1]. One thread."""
    starts[:] = 0
    for i in range(len(flat)):
        starts[flat[i] + 1] += 1
    begin = 0
    for key in range(len(starts)):
        size = starts[key]
        starts[key] = begin
        begin += size
    for i in range(len(flat)):
        key = flat[i] + 1
        order[starts[key]] = i
        starts[key] += 1
    for key in range(len(starts) - 1, 0, -1):
        starts[key] = starts[key - 1]
    starts[0] = 0


@kernel()
def transposed_sum(start, stop, weights, order, starts, out):
    """out[r] = sum of the weights of the slots that name row r."""
    flat = weights.reshape(-1)
    for r in range(start, stop):
        last = starts[r + 2] if r + 2 < len(starts) else len(order)
        total = flat.dtype.type(0)
        for p in range(starts[r + 1], last):
            total += flat[order[p]]
        out[r] = total


@kernel(SUMS)
def upstream_part(start, stop, z_values, z_indices, weights, latents, starts, out):
    """out[n] [F]: virtual weights times the upstream latents of token n. `weights` `latents` [F*C] are the virtual
    weights and their downstream latents in the order of upstream latents."""
    for n in range(start, stop):
        pre = out[n]
        pre[:] = 0
        for s in range(z_indices.shape[1]):
            j, z = z_indices[n, s], z_values[n, s]
            if j >= 0:
                last = starts[j + 2] if j + 2 < len(starts) else len(latents)
                for p in range(starts[j + 1], last):
                    pre[latents[p]] += z * weights[p]


@kernel(SUMS)
def upstream_gradients(start, stop, grad, z_values, z_indices, weights, latents, starts, dz, dweights):
    """Adds to dz [N, S] and dweights [F*C], for only the upstream latents start..stop, which own both."""
    for n in range(len(grad)):
        row = grad[n]
        for s in range(z_indices.shape[1]):
            j, z = z_indices[n, s], z_values[n, s]
            if start <= j < stop:
                last = starts[j + 2] if j + 2 < len(starts) else len(latents)
                total = grad.dtype.type(0)
                for p in range(starts[j + 1], last):
                    g = row[latents[p]]
                    total += g * weights[p]
                    dweights[p] += g * z
                dz[n, s] = total


@kernel(SUMS)
def selected_weight_gradients(start, stop, grad, selected, z_values, z_indices, connections, upstream, dV):
    """Adds to dV [F, C], for only the downstream latents start..stop, over the selected slots [N, K]."""
    z = np.zeros(upstream, dtype=grad.dtype)
    for n in range(len(grad)):
        spread = False
        for k in range(selected.shape[1]):
            f, g = selected[n, k], grad[n, k]
            if start <= f < stop and g != 0:
                if not spread:
                    spread = True
                    for s in range(z_indices.shape[1]):
                        if z_indices[n, s] >= 0:
                            z[z_indices[n, s]] += z_values[n, s]
                for c in range(connections.shape[1]):
                    if connections[f, c] >= 0:
                        dV[f, c] += g * z[connections[f, c]]
        if spread:
            for s in range(z_indices.shape[1]):
                if z_indices[n, s] >= 0:
                    z[z_indices[n, s]] = 0


@kernel(SUMS)
def selected_value_gradients(start, stop, grad, selected, z_indices, connections, V, upstream, dz):
    """dz [N, S] over the selected slots [N, K] of tokens start..stop."""
    dense = np.zeros(upstream, dtype=grad.dtype)
    for n in range(start, stop):
        for k in range(selected.shape[1]):
            f, g = selected[n, k], grad[n, k]
            if g != 0:
                for c in range(connections.shape[1]):
                    if connections[f, c] >= 0:
                        dense[connections[f, c]] += g * V[f, c]
        for s in range(z_indices.shape[1]):
            j = z_indices[n, s]
            dz[n, s] = dense[j] if j >= 0 else 0
        for k in range(selected.shape[1]):
            for c in range(connections.shape[1]):
                if connections[selected[n, k], c] >= 0:
                    dense[connections[selected[n, k], c]] = 0
