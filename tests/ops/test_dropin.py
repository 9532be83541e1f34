"""The snippets of docs/dropin.md run as they stand, and give what they replace, gradients too."""

import re
from pathlib import Path

import pytest
import torch
from op_helpers import DEVICE, rows
from torch import nn

PAGE = (Path(__file__).parents[2] / "docs" / "dropin.md").read_text()
SNIPPETS = dict(re.findall(r"^## (.*?)$.*?```python\n(.*?)```", PAGE, re.S | re.M))
N, D, F, K = 20, 8, 48, 6


def snippet(title):
    scope: dict = {}
    exec(compile(SNIPPETS[title], f"docs/dropin.md: {title}", "exec"), scope)
    return scope


def assert_same(got, expected, leaves):
    torch.testing.assert_close(got, expected)
    grads, expected_grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (got, expected))
    torch.testing.assert_close(grads, expected_grads)


def topk(pre):
    top = pre.relu().topk(K, -1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


def test_every_section_has_a_snippet():
    assert len(SNIPPETS) == PAGE.count("\n## ") == 4


def test_plain():
    sae = snippet("A plain `nn.Linear` SAE")["SAE"](D, F, K).to(DEVICE)
    x = rows(2, N, D).float()
    assert_same(sae(x), sae.decoder(topk(sae.encoder(x))), list(sae.parameters()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify(activation):
    sparsify = pytest.importorskip("sparsify", reason="pip install eai-sparsify==1.3.3")
    coder = snippet("EleutherAI sparsify")["FastCoder"]
    config = sparsify.SparseCoderConfig(num_latents=F, k=K, activation=activation)
    fast, plain = coder(D, config, device=DEVICE), sparsify.SparseCoder(D, config, device=DEVICE)
    with torch.no_grad():  # weights of our own: its random ones need not give every row K positive slots
        plain.W_dec.copy_(rows(F, D, seed=3).float())
        plain.encoder.weight.copy_(rows(F, D, seed=4).float())
        plain.encoder.bias.fill_(20.0)
    fast.load_state_dict(plain.state_dict())
    x = rows(N, D).float()
    assert all((plain.encode(x).top_acts > 0).all(1)), "where its gradient is right"
    for name, parameter in fast.named_parameters():
        with torch.no_grad():
            dict(plain.named_parameters())[name].copy_(parameter)
    got, expected = fast(x), plain(x)
    torch.testing.assert_close(got.sae_out, expected.sae_out)
    got.fvu.backward()
    expected.fvu.backward()
    for ours, theirs in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.filterwarnings("ignore")
def test_saelens():
    sae_lens = pytest.importorskip("sae_lens", reason="pip install sae-lens, in an environment of its own")
    sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D, d_sae=F, k=K, device=DEVICE))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(rows(*parameter.shape, seed=parameter.ndim))
    x = rows(2, N, D).float()
    assert_same(snippet("SAELens")["reconstruct"](sae, x), sae(x), [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec])


def test_openai():
    """Its Autoencoder's parameters and formula; the package is not on PyPI."""
    model = nn.Module()
    model.pre_bias, model.latent_bias = (nn.Parameter(rows(n, seed=n).float()) for n in (D, F))
    model.encoder, model.decoder = nn.Linear(D, F, bias=False), nn.Linear(F, D, bias=False)
    model.to(DEVICE)
    x = rows(N, D).float()
    pre = nn.functional.linear(x - model.pre_bias, model.encoder.weight, model.latent_bias)
    expected = model.decoder(topk(pre)) + model.pre_bias
    assert_same(snippet("OpenAI's autoencoder")["reconstruct"](model, x, K), expected, list(model.parameters()))
