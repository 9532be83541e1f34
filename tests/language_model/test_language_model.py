"""The language model's activations, weights and replaced runs against the identities they must satisfy."""

from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor

from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations
from sparseclt.model.attention import attention_write

EXACT = {"atol": 1e-10, "rtol": 0.0}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family, tokenizer) -> LanguageModel:
    """Float64; shared, for nothing changes it."""
    return LanguageModel.from_hf(tiny_models.hf_model(family), tokenizer, name=family)


@pytest.fixture
def tokens() -> Tensor:
    return tiny_models.tokens()


def centred_if(model: LanguageModel, residual: Tensor) -> Tensor:
    return residual - residual.mean(-1, keepdim=True) if model.shape.centred else residual


def real_mlp(model: LanguageModel, layer: int, x: Tensor) -> Tensor:
    """The model's own MLP, gain and bias of its norm included, on normalised input."""
    block = model.bridge.blocks[layer]
    norm = block.ln2.original_component
    return block.mlp.original_component(x * norm.weight + getattr(norm, "bias", 0.0))


def test_shape_describes_the_model(model, family):
    shape = model.shape
    assert (shape.name, shape.layers, shape.d_model, shape.heads) == (family, 3, 32, 4)
    assert shape.parameters == sum(p.numel() for p in model.bridge.original_model.parameters()) > 0
    assert (shape.context, shape.vocab) == (tiny_models.CONTEXT, tiny_models.VOCAB)
    assert (shape.parallel, shape.centred) == (family == "pythia", family != "llama")


def test_pythia_like_blocks_without_parallel_residual_are_sequential(tokenizer, tokens):
    config = tiny_models.config("pythia")
    config.use_parallel_residual = False
    model = LanguageModel.from_hf(tiny_models.hf_model(config), tokenizer)
    assert not model.shape.parallel
    live = model.capture(tokens)
    read = centred_if(model, live.residual(1, after_attention=True))
    torch.testing.assert_close(live.x[1] * live.scale[1][..., None], read, **EXACT)


def test_logits_are_those_of_the_unwrapped_model(family, tokenizer, tokens):
    hf = tiny_models.hf_model(family, dtype=torch.float32)
    with torch.no_grad():
        expected = hf(tokens).logits
    model = LanguageModel.from_hf(hf, tokenizer)
    torch.testing.assert_close(model.replaced_logits(tokens), expected, atol=2e-5, rtol=1e-5)


def test_float64_changes_only_rounding(model, family, tokenizer, tokens):
    single = LanguageModel.from_hf(tiny_models.hf_model(family).float(), tokenizer)
    expected = single.replaced_logits(tokens).double()
    torch.testing.assert_close(model.replaced_logits(tokens), expected, atol=1e-4, rtol=1e-4)


def test_everything_captured_is_float64_for_a_float64_model_and_without_gradient(model, tokens):
    live = model.capture(tokens, attention=True)
    lists = [live.x, live.scale, live.mlp_out, live.attn_out, live.attn_pattern, live.attn_scale]
    assert [len(kept) for kept in lists] == [3] * 6
    for tensor in [live.r_0, *sum(lists, [])]:
        assert tensor.dtype == torch.float64 and not tensor.requires_grad


def test_captured_shapes(model, tokens):
    live = model.capture(tokens, attention=True)
    B, S = tokens.shape
    assert live.tokens.shape == (B, S) and live.r_0.shape == live.x[1].shape == (B, S, 32)
    assert live.mlp_out[2].shape == live.attn_out[2].shape == (B, S, 32)
    assert live.scale[0].shape == live.attn_scale[0].shape == (B, S)
    assert live.attn_pattern[0].shape == (B, 4, S, S)


def test_attention_is_captured_only_when_asked_for(model, tokens):
    live = model.capture(tokens)
    assert live.attn_pattern == [] and live.attn_scale == []


def test_x_is_the_centred_residual_over_the_scale(model, tokens):
    live = model.capture(tokens)
    for layer in range(3):
        residual = centred_if(model, live.residual(layer, after_attention=not model.shape.parallel))
        torch.testing.assert_close(live.x[layer], residual / live.scale[layer][..., None], **EXACT)


def test_embedding_and_writes_add_up_to_every_residual(model, tokens):
    live = model.capture(tokens)
    _, cache = model.bridge.run_with_cache(tokens)
    total = live.r_0
    for layer in range(3):
        torch.testing.assert_close(total, cache[f"blocks.{layer}.hook_resid_pre"], **EXACT)
        torch.testing.assert_close(live.residual(layer), total, **EXACT)
        total = total + live.attn_out[layer]
        torch.testing.assert_close(live.residual(layer, after_attention=True), total, **EXACT)
        total = total + live.mlp_out[layer]
        torch.testing.assert_close(total, cache[f"blocks.{layer}.hook_resid_post"], **EXACT)


def test_capture_equals_the_hooks_of_a_plain_run(model, tokens):
    live = model.capture(tokens, attention=True)
    _, cache = model.bridge.run_with_cache(tokens)
    assert torch.equal(live.r_0, cache["blocks.0.hook_resid_pre"])
    for layer in range(3):
        block = f"blocks.{layer}"
        assert torch.equal(live.x[layer], cache[f"{block}.ln2.hook_normalized"])
        assert torch.equal(live.scale[layer], cache[f"{block}.ln2.hook_scale"].squeeze(-1))
        assert torch.equal(live.mlp_out[layer], cache[f"{block}.hook_mlp_out"])
        assert torch.equal(live.attn_out[layer], cache[f"{block}.hook_attn_out"])
        assert torch.equal(live.attn_pattern[layer], cache[f"{block}.attn.hook_pattern"])
        assert torch.equal(live.attn_scale[layer], cache[f"{block}.ln1.hook_scale"].squeeze(-1))


def test_capture_takes_int32_rows(model, tokens):
    assert torch.equal(model.capture(tokens.int()).x[2], model.capture(tokens).x[2])


def count_calls(module: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_capture_runs_the_model_once_and_no_further_than_the_covered_layers(family, tokenizer, tokens):
    hf = tiny_models.hf_model(family)
    model = LanguageModel.from_hf(hf, tokenizer, layers=2)
    blocks = model.bridge.blocks
    runs, second, third, unembed = map(count_calls, (hf, blocks[1], blocks[2], model.bridge.unembed))
    live = model.capture(tokens, attention=True)
    assert len(live.mlp_out) == len(live.attn_pattern) == 2
    assert (len(runs), len(second), len(third), len(unembed)) == (1, 1, 0, 0)


def test_capture_of_all_layers_skips_the_unembedding(family, tokenizer, tokens):
    model = LanguageModel.from_hf(tiny_models.hf_model(family), tokenizer)
    calls = count_calls(model.bridge.unembed)
    model.capture(tokens)
    assert calls == []


def test_no_hook_is_left_after_a_capture_or_a_failed_replacement(model, tokens):
    expected = model.replaced_logits(tokens)
    model.capture(tokens, attention=True)
    with pytest.raises(ZeroDivisionError):
        model.replaced_logits(tokens, on_mlp=lambda layer, live: 1 // 0)
    assert torch.equal(model.replaced_logits(tokens), expected)


def test_attention_weights_reproduce_the_attention_output_of_every_layer(model, tokens):
    live = model.capture(tokens, attention=True)
    for layer in range(3):
        weights = model.attention_weights(layer)
        base = centred_if(model, live.residual(layer))
        mix = live.attn_pattern[layer] / live.attn_scale[layer][:, None, None, :]
        heads = torch.einsum("bhqk,bkd,hde->bhqe", mix, base, weights.W_V)
        written = torch.einsum("bhqe,hef->bqf", heads, weights.W_O) + weights.bias
        torch.testing.assert_close(written, live.attn_out[layer], **EXACT)
        torch.testing.assert_close(attention_write(live.residual(layer), mix, weights), written, **EXACT)
        assert weights.W_V.shape == (4, 32, 8) and weights.W_O.shape == (4, 8, 32) and weights.bias.shape == (32,)
        assert weights.centred == model.shape.centred


def test_attention_weights_are_copies(model):
    before = model.attention_weights(0).W_O.clone()
    model.attention_weights(0).W_O.zero_()
    assert torch.equal(model.attention_weights(0).W_O, before)


def test_identity_replacement_leaves_the_logits(model, tokens):
    plain = model.replaced_logits(tokens)
    weights = [model.attention_weights(layer) for layer in range(3)]

    def on_mlp(layer: int, live: Activations) -> Tensor:
        return real_mlp(model, layer, live.x[layer])

    def on_attn(layer: int, live: Activations) -> Tensor:
        mix = live.attn_pattern[layer] / live.attn_scale[layer][:, None, None, :]
        return attention_write(live.residual(layer), mix, weights[layer])

    torch.testing.assert_close(model.replaced_logits(tokens, on_mlp=on_mlp, on_attn=on_attn), plain, **EXACT)


def test_replacement_by_zero_moves_the_logits(model, tokens):
    plain = model.replaced_logits(tokens)
    without_mlp = model.replaced_logits(tokens, on_mlp=lambda layer, live: torch.zeros_like(live.r_0))
    without_attn = model.replaced_logits(tokens, on_attn=lambda layer, live: torch.zeros_like(live.r_0))
    assert (without_mlp - plain).abs().max() > 0.1
    assert (without_attn - plain).abs().max() > 0.1


def test_live_holds_the_replaced_run_as_far_as_it_has_come(model, tokens):
    real = model.capture(tokens)
    lives: list[Activations] = []

    def on_mlp(layer: int, live: Activations) -> Tensor:
        lives.append(live)
        assert len(live.x) == len(live.scale) == len(live.mlp_out) == layer + 1
        assert len(live.attn_out) >= layer + 1 and live.attn_pattern == []
        torch.testing.assert_close(live.mlp_out[layer], real_mlp(model, layer, live.x[layer]), **EXACT)
        return torch.full_like(live.r_0, layer + 1.0)

    model.replaced_logits(tokens, on_mlp=on_mlp)
    live = lives[-1]
    assert torch.equal(live.x[0], real.x[0]) and not torch.allclose(live.x[1], real.x[1])
    assert [out.unique().tolist() for out in live.mlp_out] == [[1.0], [2.0], [3.0]]
    for layer in range(3):
        residual = centred_if(model, live.residual(layer, after_attention=not model.shape.parallel))
        torch.testing.assert_close(live.x[layer] * live.scale[layer][..., None], residual, **EXACT)


def test_on_attn_sees_the_models_own_output_and_on_mlp_the_replaced_one(model, tokens):
    real = model.capture(tokens, attention=True)
    seen: list[Tensor] = []

    def on_attn(layer: int, live: Activations) -> Tensor:
        seen.append(live.attn_out[layer])
        assert len(live.attn_pattern) == len(live.attn_scale) == layer + 1
        return torch.full_like(live.r_0, 2.0)

    def on_mlp(layer: int, live: Activations) -> Tensor:
        assert live.attn_out[layer].unique().tolist() == [2.0]
        return torch.zeros_like(live.r_0)

    model.replaced_logits(tokens, on_attn=on_attn, on_mlp=on_mlp)
    assert torch.equal(seen[0], real.attn_out[0])


def test_gradients_flow_through_replacements_and_later_activations(model, tokens):
    written = [torch.zeros(*tokens.shape, 32, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lives: list[Activations] = []

    def on_mlp(layer: int, live: Activations) -> Tensor:
        lives.append(live)
        return written[layer]

    loss = model.cross_entropy(tokens, on_mlp=on_mlp)
    gradients = torch.autograd.grad(loss, written, retain_graph=True)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    # Central difference along one direction, through everything behind layer 0.
    direction, step = torch.randn_like(written[0]), 1e-3
    shifted = [
        model.cross_entropy(tokens, on_mlp=lambda layer, live, s=s: written[layer] + (layer == 0) * s * direction)
        for s in (step, -step)
    ]
    numeric = (shifted[0] - shifted[1]) / (2 * step)
    torch.testing.assert_close((gradients[0] * direction).sum(), numeric, atol=1e-5, rtol=1e-3)
    live = lives[-1]
    for later in (live.x[1], live.scale[1], live.attn_out[1]):
        (gradient,) = torch.autograd.grad(later.square().sum(), written[0], retain_graph=True)
        assert gradient.abs().max() > 0


def test_the_model_is_frozen(model, tokens):
    written = torch.zeros(*tokens.shape, 32, dtype=torch.float64, requires_grad=True)
    model.cross_entropy(tokens, on_mlp=lambda layer, live: written).backward()
    parameters = [*model.bridge.original_model.parameters(), *model.bridge.parameters()]
    assert not any(p.requires_grad or p.grad is not None for p in parameters)
    assert not model.bridge.original_model.training


def test_cross_entropy_is_the_mean_over_next_tokens_in_nats(model, tokens):
    log_p = model.replaced_logits(tokens).log_softmax(-1)
    total = sum(-log_p[b, s, tokens[b, s + 1]] for b in range(2) for s in range(1, 11))
    torch.testing.assert_close(model.cross_entropy(tokens.int()), total / 20, **EXACT)


def test_layers_beyond_the_models_are_refused(tokenizer):
    for layers in (0, 4):
        with pytest.raises(ValueError, match=f"layers: expected 1 to 3 .*got {layers}"):
            LanguageModel.from_hf(tiny_models.hf_model("gpt2"), tokenizer, layers=layers)


def test_models_of_other_dtypes_are_refused(tokenizer):
    hf = tiny_models.hf_model("llama")
    hf.model.embed_tokens.to(torch.float8_e5m2)
    with pytest.raises(ValueError, match="hf_model: expected float32, bfloat16, float16 or float64 .*float8_e5m2"):
        LanguageModel.from_hf(hf, tokenizer)


def test_wrong_arguments_are_named(model, tokens):
    with pytest.raises(ValueError, match=r"tokens: expected int32 or int64 of shape \[B, S\]"):
        model.capture(tokens[0])
    with pytest.raises(ValueError, match="tokens: expected rows of at most 24 tokens .*got 25"):
        model.capture(tiny_models.tokens(length=25))
    with pytest.raises(ValueError, match="layer: expected a covered layer, 0 to 2, got 3"):
        model.attention_weights(3)
    with pytest.raises(ValueError, match=r"on_mlp: .*float64 of shape \(2, 12, 32\) for layer 0"):
        model.replaced_logits(tokens, on_mlp=lambda layer, live: live.r_0.flatten(0, 1))
    with pytest.raises(ValueError, match="on_attn: .*got torch.float32"):
        model.replaced_logits(tokens, on_attn=lambda layer, live: live.r_0.float())


def test_blocks_that_do_more_than_add_to_the_residual_stream_are_refused(tokenizer):
    hf = tiny_models.hf_model("gpt2")
    hf.transformer.h[0].register_forward_hook(lambda module, arguments, output: output * 0.5)
    with pytest.raises(ValueError, match="model.path: expected an MLP that reads the plain sum .* which layer 1"):
        LanguageModel.from_hf(hf, tokenizer)


def test_attention_that_is_not_linear_given_pattern_and_scales_is_refused(tokenizer):
    model = LanguageModel.from_hf(tiny_models.hf_model(tiny_models.further_config("Gemma2")), tokenizer)
    model.bridge.blocks[0].attn.o.register_forward_hook(lambda module, arguments, output: output.tanh())
    with pytest.raises(ValueError, match="attention: expected attention outputs that are linear"):
        model.attention_weights(0)


def test_load_reads_a_saved_directory_in_float32(tmp_path, tokenizer, tokens):
    hf = tiny_models.hf_model("gpt2", dtype=torch.float16)
    hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = LanguageModel.load(tmp_path, layers=1)
    assert model.shape.layers == 1 and model.shape.name == str(tmp_path)
    assert model.tokenizer("w3 w4")["input_ids"] == [3, 4]
    with torch.no_grad():
        torch.testing.assert_close(model.replaced_logits(tokens), hf.float()(tokens).logits, atol=2e-5, rtol=1e-5)


def test_paths_that_do_not_exist_are_named():
    for path in ("./nowhere", "~/nowhere", "/nowhere/at/all", "a/b/c", "model.gguf", Path("nowhere")):
        with pytest.raises(ValueError, match="model.path: expected 'embedded', .* which does not exist"):
            LanguageModel.load(path)


def test_a_missing_path_in_an_existing_directory_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ValueError, match="model.path: .*'models/gpt', which does not exist"):
        LanguageModel.load("models/gpt")


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model.path: expected a directory with config.json"):
        LanguageModel.load(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="found a.gguf, b.gguf in"):
        LanguageModel.load(tmp_path)
    (tmp_path / "notes.md").touch()
    with pytest.raises(ValueError, match="model.path: expected a directory or a .gguf file"):
        LanguageModel.load(tmp_path / "notes.md")


def test_a_name_that_cannot_be_fetched_is_named(monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    def fetch(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", fetch)
    with pytest.raises(ValueError, match="model.path: .*'owner/nowhere', .*no connection"):
        LanguageModel.load("owner/nowhere")
