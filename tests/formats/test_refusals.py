"""What a SparseCLT cannot hold, and damaged directories, are refused by one error that names file and field."""

import json
from pathlib import Path

import foreign
import pytest
import torch
from clts import language_model, random_clt
from safetensors.torch import load_file, save_file

from sparseclt import SparseCLT
from sparseclt.export.circuit_tracer import write_clt
from sparseclt.storage.directories import CheckpointError, atomic_directory


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2")


def changed(file: Path, **tensors) -> None:
    """Give tensors of `file` other values; None removes one."""
    named = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in named.items() if tensor is not None}, file)


def skip(D=foreign.D):
    return torch.eye(D, dtype=torch.float64)


FIELDS = [
    (foreign.circuit_tracer_clt, {"feature_input_hook": "hook_resid_pre"}, r"config.yaml.*input 'hook_resid_pre'"),
    (foreign.circuit_tracer_clt, {"feature_output_hook": "hook_attn_out"}, r"config.yaml.*output 'hook_attn_out'"),
    (foreign.circuit_tracer_clt, {"model_kind": "crosscoder"}, r"config.yaml: expected model_kind .* got 'crosscoder'"),
    (foreign.circuit_tracer_clt, {"model_kind": "[1"}, r"config.yaml is damaged"),
    (foreign.circuit_tracer_set, {"activation": "gelu"}, r"config.yaml: expected activation .* got 'gelu'"),
    (foreign.circuit_tracer_set, {"activation": "topk"}, r"config.yaml: expected k to be a whole number"),
    (foreign.circuit_tracer_set, {"transcoders": "[hf://a/b/c]"}, r"transcoders names files that lie elsewhere"),
    (foreign.sparsify, {"transcode": False}, r"h.0.mlp/cfg.json: expected transcode True"),
    (foreign.sparsify, {"activation": "groupmax"}, r"expected activation 'topk' or None.* got 'groupmax'"),
    (foreign.sparsify, {"per_source_tied": True}, r"expected per_source_tied None or False.* got True"),
    (foreign.sparsify, {"coalesce_topk": "concat"}, r"expected coalesce_topk None or 'none'.* got 'concat'"),
    (foreign.sparsify, {"k": 0}, r"expected k to be a whole number of at least 1, got 0"),
    (foreign.saelens, {"architecture": "jumprelu"}, r"transcoder_0/cfg.json: expected architecture .* got 'jumprelu'"),
    (foreign.saelens, {"normalize_activations": "layer_norm"}, r"expected normalize_activations None or 'none'"),
    (foreign.saelens, {"metadata": {"hook_name": "blocks.0.hook_resid_post"}}, r"expected hook_name_out to be a hook"),
    (foreign.gemma_scope, {"hf_hook_point_in": "model.layers.0.output"}, r"input 'output', expected 'mlp.hook_in'"),
    (foreign.gemma_scope, {"architecture": "topk"}, r"expected architecture None or 'jump_relu'"),
]


@pytest.mark.parametrize(("write", "config", "message"), FIELDS)
def test_a_field_is_refused_by_name(write, config, message, model, tmp_path):
    path = write(tmp_path / "theirs", foreign.weights("own"), **config)
    if write is foreign.circuit_tracer_clt:
        path = write(tmp_path / "clt", foreign.weights("all"), **config)
    with pytest.raises(CheckpointError, match=message):
        SparseCLT.from_pretrained(path, language_model=model, active=3)


def save_as(name, **tensors):
    return lambda path: changed(path / name, **tensors)


TENSORS = [
    (foreign.circuit_tracer_set, save_as("layer_1.safetensors", W_skip=skip()), r"layer_1.*: W_skip is not zero"),
    (foreign.circuit_tracer_set, save_as("layer_1.safetensors", scale=skip()), r"layer_1.*'scale' is a tensor that"),
    (foreign.circuit_tracer_set, save_as("layer_1.safetensors", b_enc=None), r"layer_1.* lacks the tensor 'b_enc'"),
    (foreign.circuit_tracer_set, save_as("layer_1.safetensors", b_enc=skip()), r"layer_1.*b_enc has shape \[32, 32\]"),
    (foreign.circuit_tracer_set, save_as("layer_0.safetensors", b_enc=torch.zeros(20).long()), r"is of dtype I64"),
    (
        foreign.circuit_tracer_set,
        save_as("layer_2.safetensors", activation_function__threshold=torch.full((20,), -1.0)),
        r"layer_2.*threshold is negative or NaN somewhere",
    ),
    (foreign.gemma_scope, save_as("layer_1_width_16k_l0_small/params.safetensors", affine_skip_connection=skip()),
     r"layer_1_.*affine_skip_connection is not zero.*without _affine"),
    (foreign.sparsify, save_as("h.2.mlp/sae.safetensors", post_enc=torch.ones(20)), r"h.2.mlp.*post_enc is not zero"),
    (foreign.sparsify, save_as("h.2.mlp/sae.safetensors", W_skip=skip()), r"h.2.mlp.*W_skip is not zero"),
    (foreign.saelens, save_as("transcoder_2/sae_weights.safetensors", W_skip=skip()), r"transcoder_2.*W_skip is not"),
    (foreign.circuit_tracer_set, lambda path: (path / "layer_1.safetensors").unlink(), r"has the layers \[0, 2\]"),
    (foreign.circuit_tracer_set, lambda path: (path / "layer_1.safetensors").write_bytes(b"x" * 80), r"layer_1"),
    (foreign.sparsify, lambda path: (path / "h.1.mlp").rename(path / "h.1.attn"), r"h.1.attn: expected the name of an"),
    (foreign.sparsify, lambda path: (path / "h.1.mlp" / "cfg.json").write_text("{"), r"h.1.mlp/cfg.json is damaged"),
    (foreign.sparsify, lambda path: (path / "config.json").write_text('{"hookpoints_in": ["h.0"]}'), r"hookpoints_in"),
    (foreign.gemma_scope, lambda path: (path / "layer_1_width_16k_l0_small").rename(path / "layer_0_big"),
     r"both layer_0_big and layer_0_width_16k_l0_small of layer 0"),
]  # fmt: skip


@pytest.mark.parametrize(("write", "spoil", "message"), TENSORS)
def test_a_tensor_or_file_is_refused_by_name(write, spoil, message, model, tmp_path):
    path = write(tmp_path / "theirs", foreign.weights("own"))
    spoil(path)
    with pytest.raises(CheckpointError, match=message):
        SparseCLT.from_pretrained(path, language_model=model, active=3)


@pytest.mark.parametrize("file", ["layer_1.safetensors", "config.yaml"])
def test_links_are_refused(file, model, tmp_path):
    path = foreign.circuit_tracer_set(tmp_path / "theirs", foreign.weights("own"))
    (path / file).rename(tmp_path / "elsewhere")
    (path / file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"{file} is a symbolic link"):
        SparseCLT.from_pretrained(path, language_model=model, active=3)


def test_an_exported_directory_with_a_flipped_byte_is_refused(model, tmp_path):
    path = tmp_path / "export"
    with atomic_directory(path) as directory:
        write_clt(random_clt(model, activation="jumprelu"), model, directory)
    file = path / "W_dec_1.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"W_dec_1.safetensors has changed bytes"):
        SparseCLT.from_pretrained(path, language_model=model, active=3)


def test_missing_arguments_are_named(model, tmp_path):
    path = foreign.circuit_tracer_clt(tmp_path / "theirs", foreign.weights("all"), model_name="tiny")
    with pytest.raises(ValueError, match=r"language_model: expected the model .*LanguageModel.load\('tiny'\)"):
        SparseCLT.from_pretrained(path)
    with pytest.raises(ValueError, match=r"active: expected the mean number of active latents"):
        SparseCLT.from_pretrained(path, language_model=model)
    eai = foreign.sparsify(tmp_path / "eai", foreign.weights("own"))
    with pytest.raises(ValueError, match=r"active: expected None or the 5"):
        SparseCLT.from_pretrained(eai, language_model=model, active=3)
    with pytest.raises(ValueError, match=r"language_model: expected 2 covered layers.*layers=2"):
        SparseCLT.from_pretrained(foreign.sparsify(tmp_path / "two", foreign.weights("own")[:2]), language_model=model)
    with pytest.raises(ValueError, match=r"active: expected None for .*no directory of another tool"):
        SparseCLT.from_pretrained(random_clt(model).save_pretrained(tmp_path / "ours"), active=3)


@pytest.mark.parametrize("hook", ["ln2.hook_normalized", None])
def test_a_hook_that_versions_of_transformer_lens_read_differently_has_to_be_explained(hook, model, tmp_path):
    layers = foreign.weights("all")
    path = foreign.circuit_tracer_clt(tmp_path / "theirs", layers, feature_input_hook=hook or "null")
    with pytest.raises(ValueError, match=r"input_hook: .*give 'mlp.hook_in' if"):
        SparseCLT.from_pretrained(path, language_model=model, active=3)
    before, after = (
        SparseCLT.from_pretrained(path, language_model=model, active=3, input_hook=name)
        for name in ("ln2.hook_normalized", "mlp.hook_in")
    )
    gain = model.mlp_norm(0)[0]
    assert torch.equal(before.transcoder(0).W_enc, layers[0]["W_enc"])
    assert torch.equal(after.transcoder(0).W_enc, layers[0]["W_enc"] * gain)


def test_the_hook_of_an_rms_norm_always_stood_before_the_gain(tmp_path):
    layers = foreign.weights("all")
    path = foreign.circuit_tracer_clt(tmp_path / "theirs", layers, feature_input_hook="ln2.hook_normalized")
    clt = SparseCLT.from_pretrained(path, language_model=language_model("llama"), active=3)
    assert torch.equal(clt.transcoder(0).W_enc, layers[0]["W_enc"])


def test_a_directory_of_ours_that_lost_its_configuration_is_not_taken_for_another_tools(model, tmp_path):
    path = random_clt(model, activation="jumprelu").save_pretrained(tmp_path / "ours")
    (path / "sparseclt.json").unlink()
    with pytest.raises(CheckpointError, match=r"sparseclt.json is missing"):
        SparseCLT.from_pretrained(path)


def test_the_layer_of_a_saelens_folder_is_what_its_metadata_say(model, tmp_path):
    path = foreign.saelens(tmp_path / "theirs", foreign.weights("own"))
    for i in range(3):
        (path / f"transcoder_{i}").rename(path / f"part_{2 - i}")
    clt = SparseCLT.from_pretrained(path, language_model=model, active=3)
    assert torch.equal(clt.transcoder(0).W_dec, foreign.weights("own")[0]["W_dec"])
    cfg = json.loads((path / "part_0" / "cfg.json").read_text())
    cfg["metadata"]["hook_name_out"] = "blocks.1.hook_mlp_out"
    (path / "part_0" / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(CheckpointError, match=r"part_0/cfg.json: expected hook_name_out in layer 2"):
        SparseCLT.from_pretrained(path, language_model=model, active=3)
