"""Both modes of a SparseCLT against the formulas, on the three families of models."""

import pytest
import torch
from clts import LAYERS, connect_random, language_model, open_all, random_clt, tokens
from tiny_models import FAMILIES

from sparseclt.model.attention import attention_write, centre, head_rows
from sparseclt.model.clt import SparseCLT
from sparseclt.model.shape import Architecture, ModelShape
from sparseclt.model.sites import Site, is_earlier

both_kinds = pytest.mark.parametrize("attention", ["frozen", "latents"])
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return language_model(request.param)


@both_kinds
def test_all_connections_open_and_real_upstream_outputs_make_both_modes_equal(model, attention):
    clt = random_clt(model, attention)
    open_all(clt)
    activations = model.capture(tokens(), attention=True)
    vanilla = clt(activations, "vanilla")
    sparse = clt(activations, "sparse", error_nodes=True)
    for site, a, b in zip(clt.sites, vanilla.latents, sparse.latents, strict=True):
        assert (a.values > 0).any(), site.name
        assert torch.equal(a.indices[a.values > 0], b.indices[b.values > 0]), site.name
        torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-10)
        torch.testing.assert_close(vanilla.output(site), sparse.output(site), rtol=0, atol=1e-10)


@both_kinds
def test_without_error_nodes_the_modes_differ_beyond_the_first_module(model, attention):
    clt = random_clt(model, attention)
    open_all(clt)
    activations = model.capture(tokens(), attention=True)
    vanilla, sparse = clt(activations, "vanilla"), clt(activations, "sparse")
    assert not torch.allclose(vanilla.latents[-1].values, sparse.latents[-1].values, atol=1e-3)


@both_kinds
def test_first_module_is_the_same_in_both_modes(model, attention):
    clt = random_clt(model, attention)
    connect_random(clt, 4)
    activations = model.capture(tokens(), attention=True)
    a, b = clt(activations, "vanilla").latents[0], clt(activations, "sparse").latents[0]
    torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-10)
    assert torch.equal(a.indices[a.values > 0], b.indices[b.values > 0])


def dense_sparse_mode(clt, model, activations):
    """Sparsely-connected latents straight from the formulas: dense masked virtual weights, pair by pair. At position 0,
    which does not count, no latents, and the model's own outputs."""
    a = clt.architecture
    B, S = activations.tokens.shape
    outputs, dense, values = {}, [], []
    first = torch.zeros(B, S, 1, dtype=torch.bool)
    first[:, 0] = True
    for i, module in enumerate(clt):
        site = module.site
        earlier = [u for u, other in enumerate(clt.sites) if is_earlier(other, site, a.model.parallel)]
        base = activations.r_0
        for u in earlier:
            real = activations.output(clt.sites[u]).view_as(base)
            base = base + torch.where(first, real, clt.transcoder(u).b_dec)
        if a.attention == "frozen":
            layers = range(site.layer if a.model.parallel else site.layer + 1)
            base = base + sum((activations.attn_out[t] for t in layers), torch.zeros_like(base))
        E = [clt.transcoder(u).W_dec[:, : site.layer - clt.sites[u].layer].sum(1) if clt.sites[u].kind == "mlp"
             else clt.transcoder(u).W_dec[:, 0] for u in earlier]  # fmt: skip
        mask = torch.zeros(module.latents, module.upstream + 1, dtype=torch.float64)
        if earlier:
            E = torch.cat(E)
            ids = module.connections.indices
            mask.scatter_(1, ids.masked_fill(ids < 0, module.upstream), 1.0)
            mask = mask[:, :-1]
            z = torch.cat([dense[u] for u in earlier], 1)
        if site.kind == "mlp":
            W = centre(module.W_enc) if a.model.centred else module.W_enc
            pre = base.flatten(0, 1) @ W.T
            if earlier:
                pre = pre + z @ ((W @ E.T) * mask).T
            pre = pre / activations.scale[site.layer].flatten()[:, None] + module.b_enc
        else:
            weights = model.attention_weights(site.layer)
            mix = activations.attn_pattern[site.layer] / activations.attn_scale[site.layer][:, None, None, :]
            pre = attention_write(base, mix, weights) @ module.W_enc.T + module.b_enc
            if earlier:
                for h in range(len(weights.W_V)):
                    V = (head_rows(module.W_enc, weights, h) @ E.T) * mask
                    pre = pre + mix[:, h] @ (z @ V.T).view(B, S, -1)
            pre = pre.flatten(0, 1)
        top = pre.masked_fill(first.view(-1, 1), 0).relu().topk(a.active)
        dense.append(torch.zeros_like(pre).scatter(1, top.indices, top.values))
        values.append(top.values)
        for target in range(module.W_dec.shape[1]):
            to = Site(site.kind, site.layer + target)
            outputs[to] = outputs.get(to, 0) + dense[i] @ module.W_dec[:, target]
        outputs[site] = torch.where(first.view(-1, 1), activations.output(site), outputs[site] + module.b_dec)
    return values, outputs


@pytest.mark.parametrize("backend", ["torch", "reference"])
@both_kinds
def test_sparse_mode_and_all_its_gradients_follow_the_dense_formulas(model, attention, backend):
    clt = random_clt(model, attention)
    connect_random(clt, 6)
    activations = model.capture(tokens(), attention=True)
    parameters = dict(clt.named_parameters())

    def gradients(values, outputs):
        weights = torch.linspace(-1, 1, model.shape.d_model, dtype=torch.float64)
        loss = sum((outputs[site] * weights).square().mean() for site in clt.sites)
        loss = loss + sum((v * v).mean() for v in values)
        return torch.autograd.grad(loss, list(parameters.values()))

    forward = clt(activations, "sparse", backend=backend)
    values, outputs = dense_sparse_mode(clt, model, activations)
    for site, ours, expected in zip(clt.sites, forward.latents, values, strict=True):
        torch.testing.assert_close(ours.values, expected, rtol=0, atol=1e-10, msg=site.name)
        torch.testing.assert_close(forward.output(site), outputs[site], rtol=0, atol=1e-10)
    ours = gradients([z.values for z in forward.latents], {s: forward.output(s) for s in clt.sites})
    for name, a, b in zip(parameters, ours, gradients(values, outputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("parallel", [False, True])
def test_attention_of_a_layer_is_upstream_of_its_mlp_only_in_sequential_blocks(parallel):
    assert is_earlier(Site("attn", 1), Site("mlp", 1), parallel) is not parallel
    assert not is_earlier(Site("mlp", 1), Site("attn", 1), parallel)
    assert is_earlier(Site("mlp", 0), Site("attn", 1), parallel)


def test_a_sequential_clt_counts_its_own_layer_s_attention_latents_upstream():
    model = language_model("gpt2")
    clt = random_clt(model, "latents")
    assert [m.upstream for m in clt] == [20 * i for i in range(2 * LAYERS)]
    parallel = random_clt(language_model("pythia"), "latents")
    assert [m.upstream for m in parallel] == [40 * (i // 2) for i in range(2 * LAYERS)]


def test_sparse_mode_without_connections_says_so():
    model = language_model("gpt2")
    with pytest.raises(ValueError, match="no connections yet"):
        random_clt(model)(model.capture(tokens()), "sparse")


def test_unknown_mode_is_named():
    model = language_model("gpt2")
    with pytest.raises(ValueError, match="mode: expected one of .*'dense'"):
        random_clt(model)(model.capture(tokens()), "dense")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"active": 9}, "active: expected at most latents = 8, got 9"),
        ({"latents": 0}, "latents: expected at least 1, got 0"),
        ({"model": ModelShape(layers=2)}, "d_model: expected at least 1, got 0"),
        ({"attention": "real"}, "attention: expected 'frozen' or 'latents', got 'real'"),
    ],
)
def test_impossible_architecture(change, message):
    with pytest.raises(ValueError, match=message):
        Architecture(**{"model": ModelShape(layers=2, d_model=4), "latents": 8, "active": 2, **change})


def test_attention_latents_need_the_attention_weights():
    with pytest.raises(ValueError, match="attention_weights: attention='latents' needs"):
        SparseCLT(Architecture(ModelShape(layers=2, d_model=4), 8, 2, "latents"))
