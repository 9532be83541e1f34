"""sparsify and clt-training: TopK transcoders, one folder per module, named after the module ("layers.3.mlp").

Source: github.com/EleutherAI/sparsify and github.com/EleutherAI/clt-training, `sparsify/sparse_coder.py` and, for how
the sources of a layer add up, `sparsify/runner.py`. clt-training's cross-layer transcoders have a decoder and a bias
for each target, and may scale latents before decoding (`post_encoder_scale`) and inputs and outputs (`normalize_io`);
both are folded into the weights.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.formats.foreign import ForeignCLT
from sparseclt.formats.layers import by_layer, expect, folders_with, json_of, the_same, whole
from sparseclt.formats.lazy import ForeignFiles, LazyTensor, stacked, summed
from sparseclt.formats.mlp_input import check_vanilla, folded_encoder, has_norm_behind_mlp, written_hook
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.model.modules import Transcoder
from sparseclt.model.shape import ratio_of
from sparseclt.storage.directories import CheckpointError, atomic_directory
from sparseclt.storage.json_files import write_json
from sparseclt.storage.safetensors_stream import save_file

NAME, CONFIG, WEIGHTS = "sparsify", "cfg.json", "sae.safetensors"


def recognises(folder: Path) -> bool:
    """Whether `folder` is laid out so."""
    return bool(folders_with(folder, CONFIG, WEIGHTS))


def read(folder: Path) -> ForeignCLT:
    """The CLT, or the set of transcoders, in `folder`, every tensor by its header."""
    folders = by_layer(((_layer(folder, name), name) for name in folders_with(folder, CONFIG, WEIGHTS)), folder)
    configs = [json_of(folder, f"{name}/{CONFIG}") for name in folders]
    for name, config in zip(folders, configs, strict=True):
        _check(folder / name / CONFIG, config)
    run = json_of(folder, "config.json") if (folder / "config.json").exists() else {}
    expect(folder / "config.json", run, hookpoints_in=(None, []))
    across = the_same(folder, "n_targets (0 or more)", [bool(config.get("n_targets")) for config in configs])
    active = [whole(folder, config, "k") for config in configs]
    if (ratio := ratio_of(active)) is None:
        raise CheckpointError(f"{folder}: expected one k in all layers, or a k that falls geometrically, got {active}")
    return ForeignCLT(
        folder=folder, tensors=_Layers(folder, folders, configs, across).tensors(), activation="topk",
        active=sum(active) // len(active), active_ratio=ratio,
        targets="all" if across else "own", input_hook="mlp.hook_in", output_hook="mlp.hook_out",
        hooks_at=f"{folder / folders[0]}: the name of the folder", model_name=str(run.get("model", "")),
    )  # fmt: skip


def _layer(folder: Path, name: str) -> int:
    if not (match := re.fullmatch(r"(?:.*\.)?(\d+)\.mlp", name)):
        raise CheckpointError(
            f"{folder / name}: expected the name of an MLP, such as layers.3.mlp: a SparseCLT replaces whole MLPs"
        )
    return int(match[1])


def _check(place: Path, config: dict[str, Any]) -> None:
    """Refuse, by field, what a CLT has no place for."""
    expect(
        place, config,
        transcode=(True,), activation=("topk", None), signed=(None, False), coalesce_topk=(None, "none"),
        per_source_tied=(None, False), secondary_target_tied=(None, False), divide_cross_layer=(None, False),
    )  # fmt: skip


class _Layers:
    """The tensors of all layers, as those of a `ForeignCLT`."""

    def __init__(self, folder: Path, folders: list[str], configs: list[dict[str, Any]], across: bool):
        self.names = [f"{name}/{WEIGHTS}" for name in folders]
        self.files = ForeignFiles(folder, self.names)
        self.configs, self.across, self.L = configs, across, len(folders)
        self.folder = folder

    def tensors(self) -> list[dict[str, LazyTensor]]:
        biases: list[list[LazyTensor]] = [[] for _ in self.names]  # of each target, from all layers that write to it
        layers = []
        for i, (name, config) in enumerate(zip(self.names, self.configs, strict=True)):
            targets = self._targets(i, config)
            parts = [f"s.{j}" if self.across else "" for j in range(targets)]
            self._check_names(name, parts)
            W_enc = self.files.tensor(name, "encoder.weight", (None, None))
            F, D = W_enc.shape
            decoders = [self._decoder(i, part, F, D) for part in parts]
            for j, part in enumerate(parts):
                biases[i + j].append(self._out(i + j, self.files.tensor(name, f"b_dec{part}", (D,))))
            layers.append(
                {
                    "W_enc": self._in(i, W_enc),
                    "b_enc": self.files.tensor(name, "encoder.bias", (F,)),
                    "W_dec": stacked([self._out(i + j, decoder) for j, decoder in enumerate(decoders)]),
                }
            )
        for layer, parts_of in zip(layers, biases, strict=True):
            layer["b_dec"] = summed(parts_of)
        return layers

    def _targets(self, i: int, config: dict[str, Any]) -> int:
        if self.across and config.get("n_targets") != self.L - i:
            raise CheckpointError(
                f"{self.folder / self.names[i]}: expected n_targets {self.L - i} in {CONFIG}, all later layers, got "
                f"{config.get('n_targets')!r}"
            )
        return self.L - i if self.across else 1

    def _check_names(self, name: str, parts: Sequence[str]) -> None:
        known = {"encoder.weight", "encoder.bias", "in_norm", "out_norm", "W_dec", "b_dec", "W_skip"}
        for part in parts:
            known |= {f"{n}{part}" for n in ("W_dec", "b_dec", "W_skip", "post_enc", "post_enc_scale")}
            self.files.check_zero(name, f"W_skip{part}", "skip connection")
            self.files.check_zero(name, f"post_enc{part}", "bias behind the activation function")
        self.files.check_zero(name, "W_skip", "skip connection")
        self.files.check_known(name, known)

    def _decoder(self, layer: int, part: str, F: int, D: int) -> LazyTensor:
        W_dec = self.files.tensor(self.names[layer], f"W_dec{part}", (F, D))
        if not self.configs[layer].get("post_encoder_scale"):
            return W_dec
        scale = self.files.tensor(self.names[layer], f"post_enc_scale{part}", (F,))
        return W_dec.converted(lambda rows: rows * scale.read()[:, None])

    def _in(self, layer: int, W_enc: LazyTensor) -> LazyTensor:
        """Encoders of a coder that divides its inputs by their mean size."""
        if not self.configs[layer].get("normalize_io"):
            return W_enc
        size = self.files.tensor(self.names[layer], "in_norm", (1,)).read()
        return W_enc.converted(partial(_scaled, by=W_enc.shape[1] ** 0.5 / size))

    def _out(self, target: int, written: LazyTensor) -> LazyTensor:
        """What is written to layer `target`, whose coder may multiply it by the mean size of its outputs."""
        if not self.configs[target].get("normalize_io"):
            return written
        size = self.files.tensor(self.names[target], "out_norm", (1,)).read()
        return written.converted(partial(_scaled, by=size / written.shape[-1] ** 0.5))


def _scaled(tensor: Tensor, by: Tensor) -> Tensor:
    return tensor * by.to(tensor.dtype)


@torch.no_grad()
def write(clt: SparseCLT, language_model: LanguageModel, path: Path) -> Path:
    """Write the vanilla mode of `clt`, a TopK one, to directory `path`: for sparsify where its targets are "own", else
    for clt-training. Gain and bias of the norm before the MLP are folded into the encoder.

    Raises ValueError for another activation, attention latents, and a model with a norm behind its MLPs.
    """
    check_vanilla(clt, NAME, ("topk",))
    if (hook := written_hook(clt, language_model)) != "mlp.hook_in":
        raise ValueError(f"format: {NAME} reads the input of the MLP itself, this CLT reads {hook}")
    if has_norm_behind_mlp(language_model):
        raise ValueError(f"format: {NAME} reconstructs the MLP itself, but this model has a norm behind it")
    names = _hookpoints(language_model)
    with atomic_directory(path) as directory:
        for layer, module in enumerate(clt):
            folder = directory / names[layer]
            folder.mkdir()
            save_file(_stored(module, language_model, across=clt.architecture.targets == "all"), folder / WEIGHTS)
            write_json(folder / CONFIG, _config(clt, layer), "config")
    return path


def _hookpoints(language_model: LanguageModel) -> list[str]:
    """The names of the MLPs of the covered layers in the base model of the language model, "h.0.mlp" and so on."""
    model = language_model.bridge.original_model
    prefix = f"{model.base_model_prefix}."
    plain = [name.replace("._original_component", "") for name, _ in model.named_modules()]
    found = {int(m[1]): name.removeprefix(prefix) for name in plain if (m := re.fullmatch(r".*\.(\d+)\.mlp", name))}
    if missing := [layer for layer in range(language_model.shape.layers) if layer not in found]:
        raise ValueError(f"format: {NAME} names modules, but this model has none called mlp in layer {missing[0]}")
    return [found[layer] for layer in range(language_model.shape.layers)]


def _stored(module: Transcoder, language_model: LanguageModel, across: bool) -> dict[str, Tensor]:
    W_enc, b_enc = folded_encoder(language_model, module.site.layer, module.W_enc, module.b_enc)
    tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc}
    if not across:
        return tensors | {"W_dec": module.W_dec[:, 0], "b_dec": module.b_dec}
    for j in range(module.W_dec.shape[1]):
        tensors[f"W_decs.{j}"] = module.W_dec[:, j]
        tensors[f"b_decs.{j}"] = module.b_dec if j == 0 else torch.zeros_like(module.b_dec)
        tensors[f"post_encs.{j}"] = torch.zeros_like(module.b_enc)
    return tensors


def _config(clt: SparseCLT, layer: int) -> dict[str, Any]:
    a = clt.architecture
    config = {
        "activation": "topk", "k": a.active_of(layer), "num_latents": a.latents, "d_in": a.model.d_model,
        "expansion_factor": 1, "normalize_decoder": False, "skip_connection": False, "transcode": True,
        "multi_topk": False,
    }  # fmt: skip
    if a.targets == "own":
        return config
    return config | {
        "n_targets": a.targets_of(layer), "n_sources": layer + 1, "normalize_io": False, "divide_cross_layer": False,
        "train_post_encoder": False, "post_encoder_scale": False, "per_source_tied": False,
        "secondary_target_tied": False, "coalesce_topk": "none", "topk_coalesced": False,
    }  # fmt: skip
