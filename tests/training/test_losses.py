"""Loss terms against their plain formulas."""

import pytest
import torch
from clts import connect_random, language_model, random_clt, tokens

from sparseclt.model.modules import Latents
from sparseclt.training.losses import aux_k, dead_reconstruction, fvu, latent_fvu


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


@pytest.fixture(scope="module")
def setting():
    model = language_model("gpt2")
    clt = random_clt(model)
    connect_random(clt, 6)
    return clt, model.capture(tokens())


@pytest.mark.parametrize("mode", ["vanilla", "sparse"])
def test_aux_k_moves_dead_latents_only_and_reaches_their_encoder_and_decoder(setting, mode):
    clt, activations = setting
    forward = clt(activations, mode)
    real = activations.outputs(clt.sites)
    dead = torch.zeros(3, 20, dtype=torch.bool)
    dead[1, [3, 7]] = True
    outputs = {site: forward.output(site) for site in clt.sites}
    tokens = activations.counted_tokens
    loss = sum(s.value(tokens) for s in aux_k(dead_reconstruction(forward, dead, k=2), outputs, real))
    module = clt.transcoder(1)
    W_enc, W_dec = torch.autograd.grad(loss, [module.W_enc, module.W_dec])
    others = [i for i in range(20) if i not in (3, 7)]
    # In sparsely-connected mode other modules' rows get gradients through the virtual weights, this one's do not.
    assert not W_enc[others].any() and W_enc[[3, 7]].any()
    assert not W_dec[others].any() and W_dec[[3, 7]].any()


def test_aux_k_of_vanilla_mode_encodes_the_input_not_the_target(setting):
    """Fault 4: the dead latents' codes come from the module's input."""
    clt, activations = setting
    forward = clt(activations, "vanilla")
    real = activations.outputs(clt.sites)
    dead = torch.zeros(3, 20, dtype=torch.bool)
    rows = torch.tensor([3, 7])
    dead[2, rows] = True
    outputs = {site: forward.output(site) for site in clt.sites}
    module, site = clt.transcoder(2), clt.sites[2]
    codes = torch.relu(activations.x[2].flatten(0, 1) @ module.W_enc[rows].T + module.b_enc[rows])
    counted = activations.counted_flat
    expected = fvu((real[site] - outputs[site])[counted], (codes @ module.W_dec[rows, 0])[counted])
    (sums,) = aux_k(dead_reconstruction(forward, dead, k=2), outputs, real)
    torch.testing.assert_close(sums.value(activations.counted_tokens), expected)


def test_nothing_is_written_without_dead_latents(setting):
    clt, activations = setting
    assert not dead_reconstruction(clt(activations, "vanilla"), torch.zeros(3, 20, dtype=torch.bool), k=2)
