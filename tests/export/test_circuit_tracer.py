"""A CLT exported for circuit-tracer computes there what it computes here, once TopK has become thresholds."""

from pathlib import Path

import pytest
import torch
from clts import connect_random, language_model, random_clt, tokens
from safetensors.torch import load_file

from sparseclt.export.calibration import calibrate, with_thresholds
from sparseclt.export.circuit_tracer import write_clt


def run_as_circuit_tracer_does(path: Path, model, rows):
    """Reconstructions of all layers, [N, D]: JumpReLU on the hook that config.yaml names."""
    inputs, layers = {}, len(list(path.glob("W_enc_*")))

    def keep(layer):
        return lambda x, hook: inputs.__setitem__(layer, x.flatten(0, 1))

    hooks = [(f"blocks.{layer}.mlp.hook_in", keep(layer)) for layer in range(layers)]
    model.bridge.run_with_hooks(rows, fwd_hooks=hooks, use_cache=False)
    outputs = [0] * layers
    for layer in range(layers):
        encoder, decoder = (load_file(path / f"{part}_{layer}.safetensors") for part in ("W_enc", "W_dec"))
        pre = inputs[layer] @ encoder[f"W_enc_{layer}"].T + encoder[f"b_enc_{layer}"]
        z = pre * (pre > encoder[f"threshold_{layer}"])
        for target in range(layers - layer):
            outputs[layer + target] = outputs[layer + target] + z @ decoder[f"W_dec_{layer}"][:, target]
        outputs[layer] = outputs[layer] + encoder[f"b_dec_{layer}"]
    return outputs


@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama"])
def test_the_export_computes_what_the_calibrated_clt_computes(family, tmp_path):
    model = language_model(family)
    clt = calibrate(random_clt(model), model, tokens(rows=8))
    write_clt(clt, model, tmp_path)
    rows = tokens(seed=5)
    here = clt(model.capture(rows), "vanilla")
    there = run_as_circuit_tracer_does(tmp_path, model, rows)
    counted = model.capture(rows).counted_flat
    for site, output in zip(clt.sites, there, strict=True):
        torch.testing.assert_close(output[counted], here.output(site)[counted], rtol=0, atol=1e-10)


def test_each_latent_fires_as_often_as_under_top_k():
    model = language_model("gpt2")
    topk = random_clt(model)
    connect_random(topk, 4)
    rows = tokens(rows=8)
    jump, activations = calibrate(topk, model, rows, batch_rows=3), model.capture(rows)
    a, b = (clt(activations, "vanilla") for clt in (topk, jump))
    for before, after in zip(a.latents, b.latents, strict=True):
        fired = [(latents.dense(20) > 0).sum(0) for latents in (before, after)]
        assert torch.equal(*fired) and fired[0].any()
    assert jump.architecture.activation == "jumprelu" and jump.connected


def test_batch_top_k_keeps_the_thresholds_of_vanilla_mode():
    model = language_model("gpt2")
    clt = random_clt(model, activation="batchtopk").eval()
    connect_random(clt, 4)
    for module in clt:
        module.threshold.uniform_(0.2, 1.0)
        module.threshold_sparse.fill_(9.0)
    jump, activations = with_thresholds(clt, model, tokens()), model.capture(tokens())
    for before, after in zip(clt(activations, "vanilla").latents, jump(activations, "vanilla").latents, strict=True):
        torch.testing.assert_close(before.dense(20), after.dense(20))
    assert jump.architecture.activation == "jumprelu" and jump.connected


def test_a_top_k_clt_is_not_exported_as_it_is(tmp_path):
    model = language_model("gpt2")
    with pytest.raises(ValueError, match="expected one with thresholds, got activation 'topk'"):
        write_clt(random_clt(model), model, tmp_path)
    with pytest.raises(ValueError, match="expected activation 'topk' and attention 'frozen'"):
        calibrate(random_clt(model, "latents"), model, tokens())
