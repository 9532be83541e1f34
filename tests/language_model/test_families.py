"""The two identities that every supported family of models must satisfy in float64, on tiny models with random weights:
the residual stream is the sum of what was captured, and attention is linear given its pattern and its norms' scales."""

import pytest
import tiny_models
import torch
from clts import open_all, random_clt

from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.attention import attention_write, centre

EXACT = {"atol": 1e-10, "rtol": 0.0}
POST_NORM = ("Gemma2", "Gemma3Text", "Olmo2")
MLP_INPUT = {"GPTJ": "ln1.hook_normalized", "Phi": "ln1.hook_normalized", "Olmo2": "mlp.hook_in"}


@pytest.fixture(scope="module", params=tiny_models.FAMILIES + tiny_models.FURTHER_FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(family):
    return tiny_models.config(family) if family in tiny_models.FAMILIES else tiny_models.further_config(family)


@pytest.fixture(scope="module")
def model(family, config) -> LanguageModel:
    return LanguageModel.from_hf(tiny_models.hf_model(config), tiny_models.tokenizer(), name=family)


@pytest.fixture(scope="module")
def live(model):
    return model.capture(tiny_models.tokens(), attention=True)


def test_every_mlp_reads_the_sum_of_the_embedding_and_what_was_written_before(model, live):
    for layer in range(model.shape.layers):
        residual = live.residual(layer, after_attention=not model.shape.parallel)
        read = centre(residual) if model.shape.centred else residual
        torch.testing.assert_close(live.x[layer] * live.scale[layer][..., None], read, **EXACT)


def test_attention_is_linear_given_its_pattern_and_the_scales_of_its_norms(model, live, family):
    assert len(live.attn_post_scale) == (model.shape.layers if family in POST_NORM else 0)
    for layer in range(model.shape.layers):
        post_scale = live.attn_post_scale[layer] if live.attn_post_scale else None
        weights = model.attention_weights(layer)
        written = attention_write(live.residual(layer), live.mix(layer), weights, post_scale)
        torch.testing.assert_close(written, live.attn_out[layer], **EXACT)


def test_the_logits_are_those_of_the_model_without_hooks(config):
    hf = tiny_models.hf_model(config, dtype=torch.float32)
    hf.set_attn_implementation("eager")
    tokens = tiny_models.tokens()
    with torch.no_grad():
        expected = hf(tokens).logits
    model = LanguageModel.from_hf(hf, tiny_models.tokenizer())
    torch.testing.assert_close(model.replaced_logits(tokens), expected, atol=1e-4, rtol=1e-4)


def test_replacing_outputs_by_themselves_leaves_the_logits(model, live):
    tokens = tiny_models.tokens()
    same = model.replaced_logits(
        tokens, on_mlp=lambda layer, run: live.mlp_out[layer], on_attn=lambda layer, run: live.attn_out[layer]
    )
    torch.testing.assert_close(same, model.replaced_logits(tokens), **EXACT)


def test_a_replacement_of_attention_sees_its_pattern_and_scale(model, live):
    """As the modules do that read them while the model runs."""
    seen = []

    def own(layer, run):
        seen.append(torch.equal(run.mix(layer), live.mix(layer)))
        return run.attn_out[layer]

    model.replaced_logits(tiny_models.tokens(), on_attn=own)
    assert seen == [True] * model.shape.layers


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_with_all_connections_open_and_error_nodes_both_modes_agree(model, live, attention):
    clt = random_clt(model, attention)
    open_all(clt)
    vanilla, sparse = clt(live, "vanilla"), clt(live, "sparse", error_nodes=True)
    for site, a, b in zip(clt.sites, vanilla.latents, sparse.latents, strict=True):
        assert (a.values > 0).any(), site.name
        torch.testing.assert_close(a.values, b.values, **EXACT)
        torch.testing.assert_close(vanilla.output(site), sparse.output(site), **EXACT)


def test_the_written_configuration_names_what_the_mlp_reads(model, live, family, tmp_path):
    hook = MLP_INPUT.get(family, "ln2.hook_normalized")
    assert model.shape.mlp_input == hook
    _, cache = model.bridge.run_with_cache(tiny_models.tokens())
    for layer in range(model.shape.layers):
        assert torch.equal(cache[f"blocks.{layer}.{hook}"], live.x[layer])
    random_clt(model).save_pretrained(tmp_path / "clt")
    assert f'feature_input_hook: "{hook}"\n' in (tmp_path / "clt" / "config.yaml").read_text()
