"""Loss terms against their plain formulas."""

import pytest
import torch

from sparseclt.model.modules import Latents
from sparseclt.training.losses import fvu, latent_fvu


def test_fvu_of_the_mean_is_one_and_of_the_truth_zero():
    y = torch.randn(50, 7, dtype=torch.float64) + 3
    assert fvu(y, y.mean(0).expand_as(y)).item() == pytest.approx(1)
    assert fvu(y, y).item() == 0


def test_the_mean_of_fvu_is_over_all_tokens_of_a_batch():
    """Fault 3: a mean over the batch axis of [B, S, D] alone makes the variance smaller and the FVU larger."""
    y = torch.randn(4, 6, 5, dtype=torch.float64) + torch.arange(6)[:, None]
    flat = y.flatten(0, 1)
    wrong = (y - 0.5).sub(y).square().sum() / (y - y.mean(0)).square().sum()
    right = fvu(flat, flat - 0.5)
    expected = 0.25 * flat.numel() / (flat - flat.mean(0)).square().sum()
    assert right.item() == pytest.approx(expected.item())
    assert wrong > 1.5 * right


def random_latents(N, K, F, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(N, F, generator=generator).argsort(1)[:, :K]
    values = torch.rand(N, K, generator=generator, dtype=torch.float64).sub(0.3).relu()
    return Latents(values.requires_grad_(), indices)


@pytest.mark.parametrize(("N", "K", "F"), [(1, 1, 3), (37, 4, 11), (20, 6, 6)])
def test_latent_fvu_equals_the_dense_one_with_its_gradients(N, K, F):
    a, b = random_latents(N, K, F, 0), random_latents(N, K, F, 1)
    ours, dense = latent_fvu(a, b, F), fvu(b.dense(F), a.dense(F))
    if N > 1:
        torch.testing.assert_close(ours, dense)
        inputs = (a.values, b.values)
        for x, y in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(dense, inputs), strict=True):
            torch.testing.assert_close(x, y)
