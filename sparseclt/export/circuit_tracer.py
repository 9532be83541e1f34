"""A CLT as circuit-tracer runs it: the plain weights and one threshold per latent, `pre > threshold`."""

import json
from pathlib import Path

import torch

from sparseclt.formats.mlp_input import folded_encoder, written_hook
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.directories import atomic_directory
from sparseclt.storage.json_files import write_text
from sparseclt.storage.safetensors_stream import save_file


@torch.no_grad()
def export_circuit_tracer(clt: SparseCLT, language_model: LanguageModel, path: Path) -> Path:
    """Write `clt`, one with thresholds, to directory `path`, for circuit-tracer's `load_clt` or, with targets "own",
    its `load_transcoder_set`.

    What a module reads here stands before the gain and bias of the norm; versions of TransformerLens call different
    things by that hook's name. So gain and bias are folded into the encoder, which then reads `mlp.hook_in`.
    Raises ValueError for a TopK CLT, for attention latents, and for a norm whose gain is nearly zero somewhere.
    """
    a = clt.architecture
    if a.activation == "topk":
        raise ValueError(
            "clt: expected one with thresholds, got activation 'topk', which circuit-tracer runs as ReLU; calibrate it"
        )
    if a.attention != "frozen":
        raise ValueError("clt: expected attention 'frozen', got 'latents', for which circuit-tracer has no place")
    with atomic_directory(path) as directory:
        write_text(
            directory / "config.yaml",
            f"model_kind: {'cross_layer_transcoder' if a.targets == 'all' else 'transcoder_set'}\n"
            f"model_name: {json.dumps(a.model.name)}\n"
            f"feature_input_hook: {json.dumps(written_hook(clt, language_model))}\n"
            'feature_output_hook: "hook_mlp_out"\n',
        )
        for layer, module in enumerate(clt):
            W_enc, b_enc = folded_encoder(language_model, layer, module.W_enc, module.b_enc)
            threshold = module.threshold_of("vanilla")
            if a.targets == "own":
                tensors = {"W_enc": W_enc, "b_enc": b_enc, "b_dec": module.b_dec, "W_dec": module.W_dec[:, 0]}
                tensors["activation_function.threshold"] = threshold
                save_file(tensors, directory / f"layer_{layer}.safetensors")
                continue
            encoder = {"W_enc": W_enc, "b_enc": b_enc, "b_dec": module.b_dec, "threshold": threshold}
            tensors = {f"{name}_{layer}": tensor.detach() for name, tensor in encoder.items()}
            save_file(tensors, directory / f"W_enc_{layer}.safetensors")
            save_file({f"W_dec_{layer}": module.W_dec.detach()}, directory / f"W_dec_{layer}.safetensors")
    return path
