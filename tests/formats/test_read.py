"""A CLT of another tool, read, computes what that tool computes from the MLPs' own inputs."""

import foreign
import pytest
import torch
from clts import language_model, open_all, tokens
from tiny_models import further_config, hf_model, tokenizer

from sparseclt import SparseCLT
from sparseclt.language_model.language_model import LanguageModel

FORMATS = [
    (foreign.circuit_tracer_clt, "all", "jumprelu", {}),
    (foreign.circuit_tracer_clt, "all", "relu", {"thresholds": False}),
    (foreign.circuit_tracer_set, "own", "jumprelu", {}),
    (foreign.circuit_tracer_set, "own", "relu", {"thresholds": False}),
    (foreign.circuit_tracer_set, "own", "topk", {"thresholds": False, "activation": "topk", "k": foreign.K}),
    (foreign.gemma_scope, "all", "jumprelu", {}),
    (foreign.gemma_scope, "own", "jumprelu", {}),
    (foreign.sparsify, "all", "topk", {}),
    (foreign.sparsify, "own", "topk", {}),
    (foreign.saelens, "own", "jumprelu", {}),
    (foreign.saelens, "own", "relu", {"jump": False}),
]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(("write", "targets", "activation", "options"), FORMATS)
def test_it_computes_what_the_other_tool_computes(write, targets, activation, options, family, tmp_path):
    model, layers = language_model(family), foreign.weights(targets)
    path = write(tmp_path / "theirs", layers, **options)
    active = None if activation == "topk" else foreign.F
    clt = SparseCLT.from_pretrained(path, language_model=model, active=active)
    assert clt.architecture.targets == targets and not clt.training
    rows = tokens(seed=5)
    activations = model.capture(rows)
    here, counted = clt(activations, "vanilla"), activations.counted_flat
    for site, output in zip(clt.sites, foreign.outputs(model, rows, layers, activation), strict=True):
        torch.testing.assert_close(here.output(site)[counted], output[counted], rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3Text"])
def test_gains_of_gemma_are_one_plus_the_weight_and_its_norm_behind_the_mlp_belongs_to_the_output(family, tmp_path):
    model = LanguageModel.from_hf(hf_model(further_config(family)), tokenizer(), name=family)
    layers = foreign.weights("own")[:2]
    clt = SparseCLT.from_pretrained(foreign.gemma_scope(tmp_path / "scope", layers), language_model=model)
    assert clt.architecture.active == 5
    rows = tokens(seed=5)
    activations = model.capture(rows)
    here, counted = clt(activations, "vanilla"), activations.counted_flat
    for site, output in zip(clt.sites, foreign.outputs(model, rows, layers, "jumprelu"), strict=True):
        torch.testing.assert_close(here.output(site)[counted], output[counted], rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match=r"the name of the folder names the output of the MLP itself"):
        SparseCLT.from_pretrained(foreign.sparsify(tmp_path / "eai", layers), language_model=model)


def test_weights_of_a_model_without_a_norm_before_the_mlp_are_taken_as_they_are(tmp_path):
    model = LanguageModel.from_hf(hf_model(further_config("Olmo2"), dtype=torch.float32), tokenizer(), name="Olmo2")
    layers = foreign.weights("own", dtype=torch.bfloat16)[:2]
    path = foreign.circuit_tracer_set(tmp_path / "theirs", layers)
    clt = SparseCLT.from_pretrained(path, language_model=model, active=3)
    for module, layer in zip(clt, layers, strict=True):
        assert all(torch.equal(getattr(module, name), layer[name]) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        assert torch.equal(module.threshold, layer["threshold"].float()) and module.W_enc.dtype == torch.bfloat16


def test_scales_and_later_biases_of_clt_training_are_folded(tmp_path):
    from safetensors.torch import load_file, save_file

    model, layers = language_model("gpt2"), foreign.weights("all")
    path = foreign.sparsify(tmp_path / "eai", layers, normalize_io=True, post_encoder_scale=True)
    sizes = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    expected = [{name: tensor.clone() for name, tensor in layer.items()} for layer in layers]
    for i in range(foreign.L):
        file = path / f"h.{i}.mlp" / "sae.safetensors"
        tensors = load_file(file) | {"in_norm": sizes[i : i + 1], "out_norm": sizes[i : i + 1] + 1}
        for j in range(foreign.L - i):
            scale = torch.rand(foreign.F, dtype=torch.float64)
            tensors[f"post_enc_scales.{j}"] = scale
            out = (sizes[i + j] + 1) / foreign.D**0.5
            expected[i]["W_dec"][:, j] *= scale[:, None] * out
            if j:
                tensors[f"b_decs.{j}"] = torch.full((foreign.D,), 0.5, dtype=torch.float64)
                expected[i + j]["b_dec"] = expected[i + j]["b_dec"] + 0.5
        save_file(tensors, file)
    for i, layer in enumerate(expected):
        layer["W_enc"] = layer["W_enc"] * (foreign.D**0.5 / sizes[i])
        layer["b_dec"] = layer["b_dec"] * (sizes[i] + 1) / foreign.D**0.5
    clt, rows = SparseCLT.from_pretrained(path, language_model=model), tokens(seed=5)
    activations = model.capture(rows)
    here, counted = clt(activations, "vanilla"), activations.counted_flat
    for site, output in zip(clt.sites, foreign.outputs(model, rows, expected, "topk"), strict=True):
        torch.testing.assert_close(here.output(site)[counted], output[counted], rtol=0, atol=1e-11)


def test_decoders_to_earlier_layers_in_gemma_scope_are_left_out_with_a_warning(tmp_path):
    from safetensors.torch import load_file, save_file

    model = language_model("llama")
    path = foreign.gemma_scope(tmp_path / "scope", foreign.weights("all"))
    file = path / "params_layer_1.safetensors"
    tensors = load_file(file)
    tensors["w_dec"][:, 0] = 0.25
    save_file(tensors, file)
    with pytest.warns(UserWarning, match=r"params_layer_1.*writes to layers before its own \(at most 0.25\)"):
        SparseCLT.from_pretrained(path, language_model=model)


def test_a_token_that_fills_its_room_is_a_warning(tmp_path):
    model = language_model("gpt2")
    path = foreign.circuit_tracer_clt(tmp_path / "theirs", foreign.weights("all"), thresholds=False)
    clt = SparseCLT.from_pretrained(path, language_model=model, active=1)
    with pytest.warns(UserWarning) as caught:
        clt(model.capture(tokens()), "vanilla")
    assert "tokens have 4 active latents, as many as they have room for" in str(caught[0].message)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_encoders_may_read_the_residual_stream_itself(family, tmp_path):
    plain, layers = language_model(family), foreign.weights("all")
    path = foreign.circuit_tracer_clt(tmp_path / "theirs", layers, feature_input_hook="hook_resid_mid")
    clt = SparseCLT.from_pretrained(path, language_model=plain, active=foreign.F)
    rows = tokens(seed=5)
    with pytest.raises(ValueError, match=r"activations: expected those of hook_resid_mid.*reading\('hook_resid_mid'\)"):
        clt(plain.capture(rows), "vanilla")
    model = plain.reading("hook_resid_mid")
    activations = model.capture(rows)
    here, counted = clt(activations, "vanilla"), activations.counted_flat
    theirs = foreign.outputs(plain, rows, layers, "jumprelu", "hook_resid_mid")
    for site, output in zip(clt.sites, theirs, strict=True):
        torch.testing.assert_close(here.output(site)[counted], output[counted], rtol=0, atol=1e-11)
    open_all(clt)
    sparse = clt(activations, "sparse", error_nodes=True)
    for site in clt.sites:
        torch.testing.assert_close(sparse.output(site), here.output(site), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="hook: expected 'ln2.hook_normalized'"):
        plain.reading("hook_resid_pre")
