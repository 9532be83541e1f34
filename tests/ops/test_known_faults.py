"""Faults of earlier code, as listed in the design: each would make one of these tests fail.

Elsewhere: TopK without ReLU and a gradient's last entries left zero by a grid rounded down (test_topk_encode,
test_sparse_decode), importance that cancels (test_select_connections), dense virtual weights (the memory tests).
"""

import pytest
import torch
from op_helpers import BACKENDS, DEVICE, rows

from sparseclt.ops import sparse_decode, topk_encode

ALL = ["reference", *BACKENDS]
N, D, F, K = 20, 16, 60, 8


def few_positive():
    """An encoder for which most tokens have fewer than K positive pre-activations."""
    x, W, b = (rows(*shape, seed=seed).float() for seed, shape in enumerate([(N, D), (F, D), (F,)]))
    return [leaf.requires_grad_() for leaf in (x, W, b - 8)]


def weight_gradient_error(encode):
    """The largest error of the encoder's weight gradient against dense float64 autograd, on rows with fewer than K
    positive pre-activations; the loss reads a decoder, so that zero slots get a gradient from above."""
    leaves = few_positive()
    W_dec = rows(F, D, seed=7)
    with torch.no_grad():
        assert ((leaves[0] @ leaves[1].T + leaves[2] > 0).sum(1) < K).float().mean() > 0.5

    values, indices = encode(*leaves)
    decoded = sparse_decode(values, indices, W_dec.float(), backend="torch")
    got = torch.autograd.grad((decoded - 1).square().sum(), leaves)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    pre = (exact[0] @ exact[1].T + exact[2]).relu()
    kept = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0)
    truth = torch.autograd.grad(((pre * kept) @ W_dec - 1).square().sum(), exact)
    return max(float((g.double() - t).abs().max() / t.abs().max()) for g, t in zip(got, truth, strict=True))


@pytest.mark.parametrize("backend", ALL)
def test_rows_with_fewer_than_k_positive_have_the_gradient_of_dense_autograd(backend):
    assert weight_gradient_error(lambda x, W, b: topk_encode(x, W, b, K, backend=backend)) < 1e-5


@pytest.mark.filterwarnings("ignore")  # of its imports
@pytest.mark.parametrize("backend", BACKENDS)
def test_eai_sparsify_differs_there_and_dense_autograd_says_who_is_right(backend):
    """Its fused encoder's backward pass does not mask slots whose value the ReLU made zero."""
    peer = pytest.importorskip("sparsify.fused_encoder", reason="pip install eai-sparsify==1.3.3").fused_encoder
    theirs = weight_gradient_error(lambda x, W, b: peer(x, W, b, K, "topk")[:2])
    ours = weight_gradient_error(lambda x, W, b: topk_encode(x, W, b, K, backend=backend))
    assert ours < 1e-5 < 0.1 < theirs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_eai_sparsify_agrees_on_the_values(backend, activation):
    peer = pytest.importorskip("sparsify.fused_encoder", reason="pip install eai-sparsify==1.3.3").fused_encoder
    x, W, b = few_positive()
    k = 6  # it wants F divisible by k for groupmax
    theirs = peer(x, W, b, k, activation)[0].sort(dim=1, descending=True).values
    torch.testing.assert_close(topk_encode(x, W, b, k, activation=activation, backend=backend)[0], theirs)


@pytest.mark.parametrize("backend", ALL)
def test_k_is_not_limited_to_powers_of_two_or_512(backend):
    x, W = rows(2, 4).float(), rows(700, 4, seed=1).float()
    values, _ = topk_encode(x, W, None, 601, backend=backend)
    torch.testing.assert_close(values, (x @ W.T).relu().topk(601).values)


@pytest.mark.parametrize("backend", ALL)
def test_a_decoder_as_the_transpose_view_of_a_linear_layer(backend):
    weight = rows(D, F, seed=3).float().requires_grad_()  # nn.Linear(F, D).weight
    values, indices = rows(N, K).float(), torch.arange(N * K, device=DEVICE).view(N, K) % F
    out = sparse_decode(values, indices, weight.T, backend=backend)
    dense = torch.zeros(N, F, device=DEVICE).scatter_add(1, indices, values)
    torch.testing.assert_close(out, dense @ weight.T)
    (grad,) = torch.autograd.grad(out.sum(), weight)
    torch.testing.assert_close(grad, dense.sum(0).expand(D, F))
