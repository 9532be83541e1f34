"""Directories as other tools write them, with random weights, and what those tools compute from them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

F, D, L, K = 20, 32, 3, 5  # L and D are those of the tiny models


def weights(targets: str = "all", seed: int = 0, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    """Of each layer W_enc [F, D], b_enc, W_dec [F, T, D], b_dec and threshold."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (0.3 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    return [
        {
            "W_enc": random(F, D),
            "b_enc": random(F),
            "W_dec": random(F, L - i if targets == "all" else 1, D),
            "b_dec": random(D),
            "threshold": random(F).abs(),
        }
        for i in range(L)
    ]


def circuit_tracer_clt(folder: Path, layers: list[dict[str, Tensor]], thresholds: bool = True, **config: Any) -> Path:
    folder.mkdir()
    named = {"model_kind": "cross_layer_transcoder", "feature_input_hook": "mlp.hook_in",
             "feature_output_hook": "hook_mlp_out", **config}  # fmt: skip
    (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in named.items()))
    names = ("W_enc", "b_enc", "b_dec", *(["threshold"] if thresholds else []))
    for i, layer in enumerate(layers):
        save_file({f"{name}_{i}": layer[name] for name in names}, folder / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": layer["W_dec"]}, folder / f"W_dec_{i}.safetensors")
    return folder


def circuit_tracer_set(folder: Path, layers: list[dict[str, Tensor]], thresholds: bool = True, **config: Any) -> Path:
    folder.mkdir()
    named = {"model_kind": "transcoder_set", "feature_input_hook": "mlp.hook_in",
             "feature_output_hook": "hook_mlp_out", **config}  # fmt: skip
    (folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in named.items()))
    for i, layer in enumerate(layers):
        tensors = {name: layer[name] for name in ("W_enc", "b_enc", "b_dec")} | {"W_dec": layer["W_dec"][:, 0].clone()}
        if thresholds:
            tensors["activation_function.threshold"] = layer["threshold"]
        save_file(tensors, folder / f"layer_{i}.safetensors")
    return folder


def sparsify(folder: Path, layers: list[dict[str, Tensor]], **config: Any) -> Path:
    """Per-layer transcoders, or with targets for later layers clt-training's CLT."""
    for i, layer in enumerate(layers):
        T = layer["W_dec"].shape[1]
        across = T > 1 or config.get("n_targets")
        tensors = {"encoder.weight": layer["W_enc"], "encoder.bias": layer["b_enc"]}
        if across or layers[0]["W_dec"].shape[1] > 1:
            for j in range(T):
                tensors[f"W_decs.{j}"] = layer["W_dec"][:, j].clone()
                tensors[f"b_decs.{j}"] = layer["b_dec"] if j == 0 else torch.zeros_like(layer["b_dec"])
                tensors[f"post_encs.{j}"] = torch.zeros_like(layer["b_enc"])
        else:
            tensors |= {"W_dec": layer["W_dec"][:, 0].clone(), "b_dec": layer["b_dec"]}
        cfg = {"activation": "topk", "k": K, "num_latents": F, "transcode": True, "skip_connection": False, "d_in": D}
        if layers[0]["W_dec"].shape[1] > 1:
            cfg |= {"n_targets": T, "coalesce_topk": "none", "per_source_tied": False}
        place = folder / f"h.{i}.mlp"
        place.mkdir(parents=True)
        save_file(tensors, place / "sae.safetensors")
        (place / "cfg.json").write_text(json.dumps(cfg | config))
    return folder


def saelens(folder: Path, layers: list[dict[str, Tensor]], jump: bool = True, **config: Any) -> Path:
    for i, layer in enumerate(layers):
        metadata = {"hook_name": f"blocks.{i}.mlp.hook_in", "hook_name_out": f"blocks.{i}.hook_mlp_out",
                    "sae_lens_version": "6.0.0"}  # fmt: skip
        cfg = {"architecture": "jumprelu_transcoder" if jump else "transcoder", "d_in": D, "d_out": D, "d_sae": F,
               "normalize_activations": "none", "apply_b_dec_to_input": False, "metadata": metadata}  # fmt: skip
        tensors = {"W_enc": layer["W_enc"].T.contiguous(), "b_enc": layer["b_enc"], "b_dec": layer["b_dec"]}
        tensors["W_dec"] = layer["W_dec"][:, 0].clone()
        if jump:
            tensors["threshold"] = layer["threshold"]
        place = folder / f"transcoder_{i}"
        place.mkdir(parents=True)
        save_file(tensors, place / "sae_weights.safetensors")
        (place / "cfg.json").write_text(json.dumps(cfg | config))
    return folder


def gemma_scope(folder: Path, layers: list[dict[str, Tensor]], l0: float = 5.0, **config: Any) -> Path:
    """A CLT, or per-layer transcoders where decoders have one target."""
    across = layers[0]["W_dec"].shape[1] > 1
    for i, layer in enumerate(layers):
        place = folder if across else folder / f"layer_{i}_width_16k_l0_small"
        place.mkdir(parents=True, exist_ok=True)
        before = torch.zeros(F, i, D, dtype=layer["W_dec"].dtype)
        W_dec = torch.cat([before, layer["W_dec"]], 1) if across else layer["W_dec"][:, 0].clone()
        tensors = {"w_enc": layer["W_enc"].T.contiguous(), "b_enc": layer["b_enc"], "b_dec": layer["b_dec"],
                   "w_dec": W_dec, "threshold": layer["threshold"]}  # fmt: skip
        save_file(tensors, place / (f"params_layer_{i}.safetensors" if across else "params.safetensors"))
        hooks = {"hf_hook_point_in": f"model.layers.{i}.pre_feedforward_layernorm.output",
                 "hf_hook_point_out": f"model.layers.{i}.post_feedforward_layernorm.output"}  # fmt: skip
        cfg = {"architecture": "jump_relu", "l0": l0, "model_name": "tiny", **hooks, **config}
        (place / "config.json").write_text(json.dumps(cfg))
    return folder


def outputs(
    model: Any, rows: Tensor, layers: list[dict[str, Tensor]], activation: str, hook: str = "mlp.hook_in"
) -> list[Tensor]:
    """What the tools compute: reconstructions [N, D] of all layers, from the MLPs' own inputs or at another hook."""
    inputs: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda x, hook: inputs.__setitem__(layer, x.flatten(0, 1))

    hooks = [(f"blocks.{i}.{hook}", keep(i)) for i in range(len(layers))]
    model.bridge.run_with_hooks(rows, fwd_hooks=hooks, use_cache=False)
    found = [layer["b_dec"].expand(rows.numel(), -1) for layer in layers]
    for i, layer in enumerate(layers):
        pre = inputs[i].to(layer["W_enc"].dtype) @ layer["W_enc"].T + layer["b_enc"]
        if activation == "topk":
            top = pre.relu().topk(K)
            z = torch.zeros_like(pre).scatter(1, top.indices, top.values)
        else:
            z = pre.relu() * (pre > (layer["threshold"] if activation == "jumprelu" else 0))
        for t in range(layer["W_dec"].shape[1]):
            found[i + t] = found[i + t] + z @ layer["W_dec"][:, t]
    return found
