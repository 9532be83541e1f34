"""BatchTopK and JumpReLU: the choice among candidates against the ops, and passes in both modes against dense ones."""

from dataclasses import replace

import pytest
import torch
from clts import K, connect_random, language_model, open_all, random_clt, tokens

from sparseclt import ops
from sparseclt.model import nonlinearity
from sparseclt.model.modules import Latents
from sparseclt.model.shape import Architecture, ModelShape
from sparseclt.model.sites import MODES
from sparseclt.ops.jumprelu_encode import jumprelu_reference

ACTIVATIONS = ("topk", "batchtopk", "jumprelu")
N, D, F = 7, 6, 20


def problem(ties: bool = False) -> list[torch.Tensor]:
    """x, W_enc, b_enc, threshold in float64."""
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, dtype=torch.float64, generator=g) for shape in ((N, D), (F, D), (F,)))
    if ties:
        x, W, b = x.round(), W.round(), b.round()
    return [t.requires_grad_() for t in (x, W, b, torch.rand(F, dtype=torch.float64, generator=g) + 0.5)]


def dense(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return Latents(values, indices).dense(F)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("k", [1, 3, 20])
def test_batch_top_k_of_all_candidates_is_the_op(k, ties):
    x, W, b, _ = problem(ties)
    expected = dense(*ops.batchtopk_encode(x, W, b, k, backend="reference"))
    latents = nonlinearity.batch_top_k(Latents(*ops.topk_encode(x, W, b, F)), k, N)
    assert torch.equal(dense(*latents), expected)
    assert k == 20 or int((latents.values > 0).sum()) == N * k
    assert (latents.indices[latents.values == 0] == -1).all()
    weights = torch.randn(N, F, dtype=torch.float64)
    got = torch.autograd.grad((dense(*latents) * weights).sum(), (x, W, b))
    for one, other in zip(got, torch.autograd.grad((expected * weights).sum(), (x, W, b)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_token_without_room_leaves_its_share_to_the_others():
    values = torch.tensor([[9.0, 8.0], [3.0, 2.0], [1.0, 0.0]])
    latents = nonlinearity.batch_top_k(Latents(values, torch.tensor([[4, 2], [1, 0], [3, 5]])), 1, 3)
    assert latents.values.tolist() == [[9, 8], [3, 0], [0, 0]]
    assert latents.indices.tolist() == [[4, 2], [1, -1], [-1, -1]]
    assert int(nonlinearity.full_rows(latents)) == 1


@pytest.mark.parametrize("bandwidth", [0.0, 0.3, 1.5])
def test_jump_relu_of_all_candidates_is_the_op_with_its_gradients(bandwidth):
    x, W, b, threshold = inputs = problem()
    values, indices, expected_l0 = ops.jumprelu_encode(x, W, b, threshold + 1.5, bandwidth=bandwidth)
    candidates = Latents(*ops.topk_encode(x, W, b, F))
    latents, l0 = nonlinearity.jump_relu(candidates, threshold + 1.5, bandwidth)
    assert torch.equal(dense(*latents), dense(values, indices)) and torch.equal(l0, expected_l0)
    # The op's slots, in another order: gradients of values that differ from latent to latent, as a decoder has them.
    decoder = torch.randn(F, D, dtype=torch.float64)
    target = torch.randn(N, D, dtype=torch.float64)

    def gradients(values, indices, l0):
        loss = (ops.sparse_decode(values, indices, decoder) - target).square().sum() + (l0 - 2).square().sum()
        return torch.autograd.grad(loss, inputs, retain_graph=True)

    for got, expected in zip(gradients(*latents, l0), gradients(values, indices, expected_l0), strict=True):
        torch.testing.assert_close(got, expected)
    assert bool(gradients(*latents, l0)[3].any()) == (bandwidth > 0)


@pytest.mark.parametrize("function", ["jumprelu", "above", "batchtopk"])
def test_nan_stays(function):
    values = torch.tensor([[float("nan"), 2.0], [0.5, 0.0]])
    candidates, threshold = Latents(values, torch.tensor([[0, 1], [1, 0]])), torch.ones(2)
    latents = {
        "jumprelu": lambda: nonlinearity.jump_relu(candidates, threshold, 0.1)[0],
        "above": lambda: nonlinearity.above(candidates, threshold),
        "batchtopk": lambda: nonlinearity.batch_top_k(candidates, 1, 2),
    }[function]()
    assert latents.values[0, 0].isnan() and latents.values[1].tolist() == [0, 0]


def clt_of(model, activation: str, attention: str = "frozen", **sizes):
    clt = random_clt(model, attention, activation=activation, **sizes)
    with torch.no_grad():
        for module in clt:
            for threshold in (module.threshold, module.threshold_sparse):
                if threshold is not None:
                    threshold.uniform_(0.2, 1.0)
    return clt


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("attention", ["frozen", "latents"])
@pytest.mark.parametrize("training", [True, False])
def test_both_modes_agree_with_all_connections_open_and_error_nodes(activation, attention, training):
    model = language_model("gpt2")
    clt = clt_of(model, activation, attention)
    for module in clt:
        if module.threshold_sparse is not None:
            module.threshold_sparse.copy_(module.threshold)
    open_all(clt.train(training))
    activations = model.capture(tokens(), attention=True)
    vanilla, sparse = clt(activations, "vanilla"), clt(activations, "sparse", error_nodes=True)
    for a, b in zip(vanilla.latents, sparse.latents, strict=True):
        torch.testing.assert_close(a.dense(F), b.dense(F), rtol=1e-9, atol=1e-10)
    for site in clt.sites:
        torch.testing.assert_close(vanilla.output(site), sparse.output(site), rtol=1e-9, atol=1e-10)


def active(pre: torch.Tensor, activation: str, threshold: torch.Tensor | None) -> torch.Tensor:
    """Dense latents [N, F] of dense pre-activations."""
    if activation == "jumprelu":
        return jumprelu_reference(pre.relu(), threshold, 0.1)[0]
    if activation == "batchtopk":
        kept = pre.relu().flatten().topk(len(pre) * K).indices
        return torch.zeros_like(pre).flatten().scatter(0, kept, pre.relu().flatten()[kept]).view_as(pre)
    best = pre.relu().topk(K)
    return torch.zeros_like(pre).scatter(1, best.indices, best.values)


def dense_outputs(clt, activations, mode: str, activation: str) -> list[torch.Tensor]:
    """Reconstructions of an MLP-only CLT on a sequential model, with everything dense."""
    zs: list[torch.Tensor] = []
    for layer, module in enumerate(clt):
        if mode == "vanilla":
            pre = activations.x[layer].flatten(0, 1) @ module.W_enc.T
        else:
            stream = activations.r_0 + sum(activations.attn_out[: layer + 1])
            stream = stream.flatten(0, 1) + sum(m.b_dec for m in list(clt)[:layer])
            rows = clt.reading_rows(layer)
            pre = stream @ rows.T
            for u in range(layer):
                E = clt.transcoder(u).W_dec[:, : layer - u].sum(1)
                here = torch.arange(u * F, (u + 1) * F)
                connected = (module.connection_indices[:, :, None] == here).any(1)
                pre = pre + zs[u] @ (rows @ E.T * connected).T
            pre = pre / activations.scale[layer].flatten()[:, None]
        zs.append(active(pre + module.b_enc, activation, module.threshold))
    return [
        clt.transcoder(t).b_dec + sum(zs[u] @ clt.transcoder(u).W_dec[:, t - u] for u in range(t + 1))
        for t in range(len(zs))
    ]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_outputs_and_gradients_are_those_of_a_dense_clt(activation, mode):
    model = language_model("gpt2")
    clt = clt_of(model, activation)
    connect_random(clt, 6)
    activations = replace(model.capture(tokens()), counted=None)
    forward = clt(activations, mode)
    got = [forward.output(site) for site in clt.sites]
    expected = dense_outputs(clt, activations, mode, activation)
    named = {name: p for name, p in clt.named_parameters()}

    def gradients(outputs):
        loss = sum((activations.output(s) - y).square().mean() for s, y in zip(clt.sites, outputs, strict=True))
        return torch.autograd.grad(loss, list(named.values()))

    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    for name, a, b in zip(named, gradients(got), gradients(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
    if activation == "jumprelu":
        assert len(forward.l0) == len(clt.sites) and any(m.threshold.requires_grad for m in clt)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
@pytest.mark.parametrize("mode", MODES)
def test_strong_latents_below_their_threshold_take_no_slot(mode, activation, dtype):
    """Many large pre-activations below large thresholds, and few small ones above small thresholds, which count."""
    model = language_model("gpt2", torch.float64 if dtype == torch.float64 else torch.float32)
    clt = clt_of(model, activation, active=2).to(dtype).eval()
    connect_random(clt, 6)
    with torch.no_grad():
        for module in clt:
            module.keep_wide_thresholds()
            module.b_enc[:15] += 20
            for threshold in (module.threshold, module.threshold_sparse):
                if threshold is not None:
                    threshold[:15] += 60
    assert clt.architecture.slots == 8
    forward = clt(model.capture(tokens()), mode)
    for index, latents in enumerate(forward.latents):
        everything = forward._strongest(index, F).dense(F)
        threshold = clt.transcoder(index).threshold_of(mode)
        expected = everything * (everything > threshold)
        near = (everything - threshold).abs() < 0.01 * threshold
        got = latents.dense(F)
        assert (got > 0)[forward.activations.counted_flat].any(), "a problem in which something fires"
        tolerance = 1e-5 if dtype != torch.bfloat16 else 2e-2
        counted = forward.activations.counted_flat[:, None] & ~near
        torch.testing.assert_close(
            (got * counted).float(), (expected * counted).float(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("mode", MODES)
def test_outside_training_the_latents_of_a_row_do_not_depend_on_the_batch(mode):
    model = language_model("gpt2")
    clt = clt_of(model, "batchtopk").eval()
    connect_random(clt, 6)
    rows = tokens(4)
    alone, together = (clt(model.capture(part), mode).latents for part in (rows[:1], rows))
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(a.dense(F), b.dense(F)[: rows.shape[1]])
    clt.train()
    assert int((clt(model.capture(rows), mode).latents[0].values > 0).sum()) == rows[:, 1:].numel() * K


def test_a_token_has_at_most_four_times_k_latents_or_as_many_as_there_is_room_for():
    shape = ModelShape(layers=1, d_model=4)
    assert Architecture(shape, 100, 5).slots == 5
    assert Architecture(shape, 100, 5, activation="jumprelu").slots == 20
    assert Architecture(shape, 12, 5, activation="batchtopk").slots == 12
    assert Architecture(shape, 100, 5, activation="jumprelu", room=16).slots == 80
    with pytest.raises(ValueError, match="activation: expected 'topk', .*, got 'relu'"):
        Architecture(shape, 12, 5, activation="relu")
