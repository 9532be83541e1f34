"""A CLT as circuit-tracer runs it: the plain weights and one threshold per latent, `pre > threshold`."""

import json
from importlib import resources
from pathlib import Path
from string import Template

import torch
from torch import Tensor

from sparseclt.export.latent_files import write_latents
from sparseclt.export.model_files import save_language_model
from sparseclt.formats.mlp_input import folded_encoder, written_hook
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.directories import atomic_directory
from sparseclt.storage.json_files import write_text
from sparseclt.storage.safetensors_stream import save_file


def write(clt: SparseCLT, language_model: LanguageModel, rows: Tensor, name: str, path: Path) -> None:
    """Write all that circuit-tracer needs to directory `path`: `clt`, one with thresholds (`write_clt`), the language
    model with its tokenizer, what the latents do on `rows` [R, S], and a README.md that says how to load it.

    Raises ValueError as `write_clt` does, and for a tokenizer that older versions of transformers cannot read.
    """
    check_exportable(clt)
    with atomic_directory(path) as directory:
        write_clt(clt, language_model, directory)
        save_language_model(language_model, directory / "model")
        write_latents(clt, language_model, rows, name, directory / "features")
        readme = resources.files("sparseclt.export").joinpath("circuit_tracer.md").read_text()
        write_text(directory / "README.md", Template(readme).substitute(name=name))


def check_exportable(clt: SparseCLT) -> None:
    """Raises ValueError for a CLT that circuit-tracer cannot run."""
    a = clt.architecture
    if a.activation == "topk":
        raise ValueError(
            "clt: expected one with thresholds, got activation 'topk', which circuit-tracer runs as ReLU; calibrate it"
        )
    if a.attention != "frozen":
        raise ValueError("clt: expected attention 'frozen', got 'latents', for which circuit-tracer has no place")


@torch.no_grad()
def write_clt(clt: SparseCLT, language_model: LanguageModel, directory: Path) -> None:
    """Write `clt`, one with thresholds, into `directory`, for circuit-tracer's `load_clt` or, with targets "own", its
    `load_transcoder_set`.

    What a module reads here stands before the gain and bias of the norm; versions of TransformerLens call different
    things by that hook's name. So gain and bias are folded into the encoder, which then reads `mlp.hook_in`.
    Raises ValueError for a TopK CLT, for attention latents, and for a norm whose gain is nearly zero somewhere.
    """
    check_exportable(clt)
    own = clt.architecture.targets == "own"
    write_text(
        directory / "config.yaml",
        f"model_kind: {'transcoder_set' if own else 'cross_layer_transcoder'}\n"
        f"model_name: {json.dumps(clt.architecture.model.name)}\n"
        f"feature_input_hook: {json.dumps(written_hook(clt, language_model))}\n"
        'feature_output_hook: "hook_mlp_out"\n',
    )
    for layer, module in enumerate(clt):
        W_enc, b_enc = folded_encoder(language_model, layer, module.W_enc, module.b_enc)
        threshold = module.threshold_of("vanilla")
        if own:
            tensors = {"W_enc": W_enc, "b_enc": b_enc, "b_dec": module.b_dec, "W_dec": module.W_dec[:, 0]}
            tensors["activation_function.threshold"] = threshold
            save_file(tensors, directory / f"layer_{layer}.safetensors")
            continue
        encoder = {"W_enc": W_enc, "b_enc": b_enc, "b_dec": module.b_dec, "threshold": threshold}
        tensors = {f"{name}_{layer}": tensor.detach() for name, tensor in encoder.items()}
        save_file(tensors, directory / f"W_enc_{layer}.safetensors")
        save_file({f"W_dec_{layer}": module.W_dec.detach()}, directory / f"W_dec_{layer}.safetensors")
