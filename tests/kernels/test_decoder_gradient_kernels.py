"""The gradient of a decoder in one launch, against dense sums in float64."""

import pytest
import torch
from harness import DEVICE, Guarded, assert_same_bits, distinct_ids, ids, rows

from csrc_triton.decoder_gradient import Decoder, Read, Written
from csrc_triton.transpose import transpose

N, D, F, T, K, C = 6, 20, 11, 2, 3, 4


def dense(values, indices, count):
    columns = values.new_zeros(len(values), count + 1).double()
    return columns.scatter_add(1, torch.where(indices < 0, count, indices), values.double())[:, :count]


def problem(dtype=torch.float32, centred=True):
    """A decoder of module 1 with two passes and readers behind target 0, none behind 1, and one more that meets all."""
    truth, first, written = torch.zeros(F, T, D, dtype=torch.float64, device=DEVICE), F, []
    for seed in range(2):
        values, indices = rows(N, K, dtype=dtype, seed=seed), ids(N, K, count=F, seed=seed)
        grads = [rows(N, D, dtype=dtype, seed=5 + seed + t) for t in range(T)]
        written.append(Written(values, transpose(indices, F), grads))
        for t, grad in enumerate(grads):
            truth[:, t] += dense(values, indices, F).T @ grad.double()
    readers = []
    for t in range(T + 1):
        U = (2 + t) * F
        connections, W_enc = distinct_ids(7, C, count=U, seed=20 + t), rows(7, D, dtype=dtype, seed=30 + t)
        dV = rows(7, C, dtype=dtype, seed=40 + t)
        offsets = W_enc.mean(1, dtype=torch.float32) if centred else None
        if t == 1:
            readers.append(None)
            continue
        readers.append(Read(dV, transpose(connections, U), W_enc, offsets))
        met = W_enc.double() - (offsets.double()[:, None] if centred else 0)
        truth[:, : t + 1] += (dense(dV, connections, U).T @ met)[first : first + F, None]
    return Decoder((F, T, D), first, written, readers), truth, (written, readers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_and_squares(dtype):
    decoder, truth, _ = problem(dtype)
    with Guarded():
        parts = [decoder.rows(slice(0, 4)), decoder.rows(slice(4, F))]
        squares = decoder.squares()
    gradient, touched = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    torch.testing.assert_close(gradient.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares.double(), truth.square().sum((0, 2)), rtol=1e-5, atol=1e-5)
    assert touched.tolist() == (truth != 0).any(2).any(1).tolist()
    assert_same_bits(decoder.rows(slice(0, F))[0], gradient)


def test_without_offsets_readers_or_passes():
    decoder, truth, (written, readers) = problem(centred=False)
    torch.testing.assert_close(decoder.rows(slice(0, F))[0].double(), truth, rtol=1e-5, atol=1e-5)
    only_written = Decoder((F, T, D), F, written, [])
    only_read = Decoder((F, T, D), F, [], readers)
    both = only_written.rows(slice(0, F))[0] + only_read.rows(slice(0, F))[0]
    torch.testing.assert_close(both.double(), truth, rtol=1e-5, atol=1e-5)
