"""The formulas of costs.py against counts that are made otherwise."""

import subprocess
import sys

import pytest
import torch

from sparseclt import costs
from sparseclt.costs import CLTSize, Cost, Widths


def test_it_needs_only_the_standard_library():
    """Besides the package itself, which imports nothing heavy."""
    code = "import sys, sparseclt.costs; assert not {'torch', 'numpy', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_size_of_a_clt_counts_its_tensors():
    L, D, F = 4, 5, 7
    encoders = [torch.empty(F, D) for _ in range(L)] + [torch.empty(F) for _ in range(L)]
    decoders = [torch.empty(F, L - layer, D) for layer in range(L)] + [torch.empty(D) for _ in range(L)]
    size = CLTSize.of_mlps(L, D, F)
    assert size.parameters == sum(tensor.numel() for tensor in encoders + decoders)
    assert (size.modules, size.pairs) == (4, 6)
    assert (size.encoder_vectors, size.decoder_vectors) == (28, 70)
    assert size.parameters - size.weights == size.biases == 4 * (7 + 5)


def test_bytes_of_a_gather_count_its_operands_and_result():
    bags, slots, rows, D = 3, 2, 5, 8
    weights, indices = torch.empty(bags, slots), torch.empty(bags, slots, dtype=torch.int64)
    gathered, result = torch.empty(bags, slots, D), torch.empty(bags, D)
    cost = costs.gather_sum(Widths(), bags, slots, rows, D)
    assert cost.used == sum(t.numel() * t.element_size() for t in (weights, indices, gathered, result))
    assert cost.flops == 2 * bags * slots * D
    table = torch.empty(rows, D)  # fewer rows than slots: each is read once
    assert cost.once == sum(t.numel() * t.element_size() for t in (weights, indices, table, result))


def test_backward_is_the_sum_of_its_passes():
    passes = {"forward": Cost(1, 2, 3), "dx": Cost(10, 20, 30), "dW": Cost(100, 200, 300)}
    assert costs.direction(passes, backward=False) == Cost(1, 2, 3)
    assert costs.direction(passes, backward=True) == Cost(110, 220, 330)


@pytest.mark.parametrize("op", [costs.sparse_decode, costs.topk_encode, costs.jumprelu_encode])
def test_nothing_moves_more_once_than_used(op):
    for cost in op(Widths(), N=64, D=16, F=128, K=4).values():
        assert 0 < cost.once <= cost.used


def test_eight_bit_moments_take_two_bytes_per_weight_and_two_scales_per_vector():
    size = CLTSize.of_mlps(3, 64, 100)
    vectors = size.encoder_vectors + size.decoder_vectors
    fp32, small = (costs.adam_state_bytes(size, eight, False) for eight in (False, True))
    assert fp32 - small == 6 * size.weights - 8 * vectors
    assert costs.adam_state_bytes(size, True, True) - small == 4 * size.decoder_vectors
