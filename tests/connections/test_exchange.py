"""Candidates of learned connections, exchanged for better ones that are found without a matrix of all pairs."""

import pytest
import torch
from clts import language_model, random_clt, tokens

from sparseclt.connections import exchange
from sparseclt.connections.gradients import RecentGradients

ROWS = tokens(rows=16, length=12)
ALL = slice(0, 20)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


def with_gates(model, attention: str, share: float = 0.3):
    """A CLT with a gate for each pair, a share of which are open."""
    clt = random_clt(model, attention)
    generator = torch.Generator().manual_seed(1)
    for module in clt:
        if module.upstream:
            module.connect(torch.arange(module.upstream).expand(module.latents, -1))
            is_open = torch.rand(module.latents, module.upstream, generator=generator) < share
            module.logits = torch.nn.Parameter(is_open.double() - 0.5)
    return clt


def backward(clt, activations):
    """The latents of a pass in sparsely-connected mode, and the gradients of its squared error with respect to them."""
    forward = clt(activations, "sparse")
    for z in forward.latents:
        z.values.retain_grad()
    sum((activations.output(site) - forward.output(site)).square().sum() for site in clt.sites).backward()
    return forward.latents, [z.values.grad for z in forward.latents]


def gate_gradients(module):
    """The gradient of the loss with respect to each gate, 0 or 1."""
    p = torch.sigmoid(module.logits.detach())
    return module.logits.grad / (p * (1 - p))


def gains(clt, recent, rows=ALL):
    """By reader: how much opening each connection lowers the loss, [rows, U]."""
    readers = exchange.effective_decoders(clt.readers(), clt.sites, [m.W_dec.detach() for m in clt])
    return {reader.index: exchange._gain(clt, recent, reader, E, rows) for reader, E in readers}


def test_recent_latents_tell_the_gradient_of_every_gate_open_or_closed(model):
    clt, activations = with_gates(model, "frozen"), model.capture(ROWS)
    recent = RecentGradients(clt.sites, clt.architecture.active, ROWS.numel(), heads=1)
    recent.add(*backward(clt, activations), activations)
    for index, found in gains(clt, recent, slice(3, 17)).items():
        expected = -gate_gradients(clt.transcoder(index))[3:17]
        assert expected.abs().max() > 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_keys_that_are_drawn_tell_the_gradient_of_an_attention_readers_gates_on_average(model):
    clt, activations = with_gates(model, "latents"), model.capture(ROWS, attention=True)
    draws, n = 150, activations.counted_tokens
    recent = RecentGradients(clt.sites, clt.architecture.active, draws * n, heads=model.shape.heads)
    latents, gradients = backward(clt, activations)
    for _ in range(draws):
        recent.add(latents, gradients, activations)
    for index, found in gains(clt, recent).items():
        expected = -gate_gradients(clt.transcoder(index))
        error = (found - expected).norm() / expected.norm()
        assert error < (0.1 if clt.sites[index].kind == "attn" else 1e-4), clt.sites[index].name


def test_what_the_ring_has_overwritten_is_not_read(model):
    clt, activations = with_gates(model, "latents"), model.capture(ROWS, attention=True)
    latents, gradients = backward(clt, activations)
    n = activations.counted_tokens
    capacity = n + 7
    recent = RecentGradients(clt.sites, clt.architecture.active, capacity, heads=model.shape.heads)
    for _ in range(3):
        recent.add(latents, gradients, activations)
    index = next(i for i, site in enumerate(clt.sites) if site.kind == "attn" and i)
    age = (int(recent.seen) - 1 - torch.arange(capacity)) % capacity
    stale = (age[recent.sources[index].long()] < age[:, None]) & (recent.weights[index] > 0)
    assert stale.any(), "a case in which it matters"
    found = recent.gradient(index, ALL, clt.upstream[index], 20)
    recent.weights[index][stale] = 0
    assert torch.equal(found, recent.gradient(index, ALL, clt.upstream[index], 20))
