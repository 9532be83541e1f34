"""A CLT written in another tool's format and read back is the same: to the last bit where no gain is in the way."""

from dataclasses import replace

import pytest
import torch
from clts import F, language_model, random_clt, tokens
from tiny_models import further_config, hf_model, tokenizer

from sparseclt import SparseCLT
from sparseclt.export.circuit_tracer import write_clt
from sparseclt.formats import saelens, sparsify
from sparseclt.language_model.language_model import LanguageModel


def circuit_tracer_clt(clt, model, path):
    path.mkdir()
    write_clt(clt, model, path)
    return path


WRITERS = [
    (circuit_tracer_clt, "all", "jumprelu"),
    (circuit_tracer_clt, "own", "jumprelu"),
    (sparsify.write, "all", "topk"),
    (sparsify.write, "own", "topk"),
    (saelens.write, "own", "jumprelu"),
]


@pytest.fixture(scope="module")
def models():
    """A model with gains and biases, and the same one without."""
    hf = hf_model("gpt2", dtype=torch.float32)
    for block in hf.transformer.h:
        torch.nn.init.ones_(block.ln_2.weight)
        torch.nn.init.zeros_(block.ln_2.bias)
    plain = LanguageModel.from_hf(hf, tokenizer(), name="plain")
    return language_model("gpt2", torch.float32), plain


def clt_on(model, targets, activation):
    all_targets = random_clt(model, activation=activation)
    clt = SparseCLT(replace(all_targets.architecture, targets=targets)).eval()
    for module, other in zip(clt, all_targets, strict=True):
        for name in ("W_enc", "b_enc", "b_dec"):
            getattr(module, name).data.copy_(getattr(other, name))
        module.W_dec.data.copy_(other.W_dec[:, : module.W_dec.shape[1]])
        if activation == "jumprelu":
            module.threshold.data.uniform_(0, 0.3)
    return clt


@pytest.mark.parametrize(("write", "targets", "activation"), WRITERS)
def test_without_a_gain_every_bit_comes_back(write, targets, activation, models, tmp_path):
    clt = clt_on(models[1], targets, activation)
    active = None if activation == "topk" else clt.architecture.active
    read = SparseCLT.from_pretrained(
        write(clt, models[1], tmp_path / "theirs"), language_model=models[1], active=active
    )
    assert read.architecture == clt.architecture
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in clt.state_dict().items())


@pytest.mark.parametrize(("write", "targets", "activation"), WRITERS)
def test_with_a_gain_encoders_come_back_within_one_unit_of_the_last_place(write, targets, activation, models, tmp_path):
    model = models[0]
    clt, active = clt_on(model, targets, activation), None if activation == "topk" else 5
    read = SparseCLT.from_pretrained(write(clt, model, tmp_path / "theirs"), language_model=model, active=active)
    for a, b in zip(read, clt, strict=True):
        assert torch.equal(a.W_dec, b.W_dec) and torch.equal(a.b_dec, b.b_dec)
        ulp = torch.nextafter(b.W_enc.abs(), torch.tensor(torch.inf)) - b.W_enc.abs()
        assert ((a.W_enc - b.W_enc).abs() <= ulp).all() and not torch.equal(a.W_enc, b.W_enc)
    activations = model.capture(tokens(seed=5))
    theirs, ours = (c(activations, "vanilla") for c in (read, clt))
    for site in clt.sites:
        torch.testing.assert_close(theirs.output(site), ours.output(site), rtol=0, atol=1e-4)


def test_the_names_of_the_folders_are_those_of_the_modules(models, tmp_path):
    path = sparsify.write(clt_on(models[0], "all", "topk"), models[0], tmp_path / "eai")
    assert sorted(folder.name for folder in path.iterdir() if folder.is_dir()) == ["h.0.mlp", "h.1.mlp", "h.2.mlp"]


def test_what_a_format_cannot_hold_is_refused(models, tmp_path):
    jump, topk = clt_on(models[0], "all", "jumprelu"), clt_on(models[0], "own", "topk")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="format: sparsify holds activation topk, got one with jumprelu"):
        sparsify.write(jump, models[0], out)
    with pytest.raises(ValueError, match="format: saelens holds transcoders of one layer each"):
        saelens.write(jump, models[0], out)
    with pytest.raises(ValueError, match="format: saelens holds activation jumprelu or batchtopk, got one with topk"):
        saelens.write(topk, models[0], out)
    with pytest.raises(ValueError, match="format: sparsify has no place for attention latents"):
        sparsify.write(random_clt(models[0], "latents"), models[0], out)
    gemma = LanguageModel.from_hf(hf_model(further_config("Gemma2"), dtype=torch.float32), tokenizer(), name="gemma")
    with pytest.raises(ValueError, match="format: sparsify reconstructs the MLP itself"):
        sparsify.write(random_clt(gemma, latents=F), gemma, out)
    assert not out.exists()
