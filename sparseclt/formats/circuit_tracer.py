"""circuit-tracer: cross-layer transcoders and sets of per-layer transcoders.

Source: github.com/decoderesearch/circuit-tracer, `circuit_tracer/transcoder/` (`load_clt`, `load_transcoder_set`).
ReLU without thresholds, else JumpReLU, `pre > threshold`; sets of per-layer transcoders may name `activation: topk` and
`k`. Its TopK keeps negative pre-activations among the K largest, where a `SparseCLT` has zero: they differ on tokens
with fewer than K positive ones.
"""

from pathlib import Path
from typing import Any, Literal

import yaml

from sparseclt.formats.foreign import ForeignCLT, nonnegative
from sparseclt.formats.layers import expect, numbered, the_same, whole
from sparseclt.formats.lazy import ForeignFiles, LazyTensor, stacked
from sparseclt.storage.directories import MANIFEST, CheckpointError, check_regular, verify

NAME, CONFIG = "circuit-tracer", "config.yaml"
LARGEST = 1 << 20  # bytes of config.yaml
THRESHOLD = "activation_function.threshold"


def recognises(folder: Path) -> bool:
    """Whether `folder` is laid out so."""
    return any((folder / f"{name}_0.safetensors").exists() for name in ("W_enc", "layer"))


def read(folder: Path) -> ForeignCLT:
    """The CLT in `folder`, every tensor by its header."""
    if (folder / MANIFEST).exists():  # exported by sparseclt
        verify(folder)
    config = _config(folder)
    kind = config.get("model_kind", "cross_layer_transcoder" if (folder / "W_enc_0.safetensors").exists() else None)
    if kind not in ("cross_layer_transcoder", "transcoder_set"):
        raise CheckpointError(
            f"{folder / CONFIG}: expected model_kind 'cross_layer_transcoder' or 'transcoder_set', got {kind!r}"
        )
    if "transcoders" in config:
        raise CheckpointError(
            f"{folder / CONFIG}: transcoders names files that lie elsewhere; expected them in this directory, as "
            "layer_0.safetensors and so on, and the field removed"
        )
    across = kind == "cross_layer_transcoder"
    layers, activation, k = _cross_layer(folder) if across else _per_layer(folder, config)
    return ForeignCLT(
        folder=folder, tensors=layers, activation=activation, active=k, targets="all" if across else "own",
        input_hook=_text(folder, config, "feature_input_hook"),
        output_hook=_text(folder, config, "feature_output_hook") or "hook_mlp_out",
        hooks_at=f"{folder / CONFIG}: feature_input_hook and feature_output_hook",
        model_name=_text(folder, config, "model_name") or "",
    )  # fmt: skip


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    if not file.exists():
        return {}
    check_regular(folder, CONFIG)
    with file.open("rb") as stream:
        content = stream.read(LARGEST + 1)
    try:
        if len(content) > LARGEST:
            raise ValueError(f"longer than {LARGEST} bytes")
        values = yaml.safe_load(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{file} is damaged ({' '.join(str(error).split())}): expected YAML") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} is damaged: expected names with values, got {type(values).__name__}")
    return values


def _text(folder: Path, config: dict[str, Any], name: str) -> str | None:
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise CheckpointError(f"{folder / CONFIG}: expected {name} to be a text, got {value!r}")
    return value


Layers = tuple[list[dict[str, LazyTensor]], Literal["topk", "jumprelu", "relu"], int | None]


def _cross_layer(folder: Path) -> Layers:
    encoders = numbered(folder, r"W_enc_(\d+)\.safetensors")
    L = len(encoders)
    files = ForeignFiles(folder, [*encoders, *(f"W_dec_{i}.safetensors" for i in range(L))])
    layers = []
    for i, encoder in enumerate(encoders):
        decoder = f"W_dec_{i}.safetensors"
        files.check_known(encoder, [f"{n}_{i}" for n in ("W_enc", "b_enc", "b_dec", "threshold", "W_skip")])
        files.check_known(decoder, [f"W_dec_{i}"])
        files.check_zero(encoder, f"W_skip_{i}", "skip connection")
        W_enc = files.tensor(encoder, f"W_enc_{i}", (None, None))
        F, D = W_enc.shape
        layers.append(
            {
                "W_enc": W_enc,
                "b_enc": files.tensor(encoder, f"b_enc_{i}", (F,)),
                "b_dec": files.tensor(encoder, f"b_dec_{i}", (D,)),
                "W_dec": files.tensor(decoder, f"W_dec_{i}", (F, L - i, D)),
            }
        )
        if f"threshold_{i}" in files.names[encoder]:
            layers[-1]["threshold"] = nonnegative(files.tensor(encoder, f"threshold_{i}", (F,)))
    return layers, _by_thresholds(folder, layers), None


def _per_layer(folder: Path, config: dict[str, Any]) -> Layers:
    names = numbered(folder, r"layer_(\d+)\.safetensors")
    expect(folder / CONFIG, config, activation=(None, "relu", "jump_relu", "jumprelu", "topk"))
    files = ForeignFiles(folder, names)
    layers = []
    for name in names:
        files.check_known(name, ["W_enc", "W_dec", "b_enc", "b_dec", THRESHOLD, "W_skip", "k"])
        files.check_zero(name, "W_skip", "skip connection")
        W_enc = files.tensor(name, "W_enc", (None, None))
        F, D = W_enc.shape
        layers.append(
            {
                "W_enc": W_enc,
                "b_enc": files.tensor(name, "b_enc", (F,)),
                "b_dec": files.tensor(name, "b_dec", (D,)),
                "W_dec": stacked([files.tensor(name, "W_dec", (F, D))]),
            }
        )
        if THRESHOLD in files.names[name]:
            layers[-1]["threshold"] = nonnegative(files.tensor(name, THRESHOLD, (F,)))
    found = _by_thresholds(folder, layers)
    if config.get("activation") == "topk" or any("k" in files.names[name] for name in names):
        expect(folder / CONFIG, config, activation=("topk",))
        return layers, "topk", whole(folder / CONFIG, config, "k")
    if config.get("activation") == "relu" and found == "jumprelu":
        raise CheckpointError(f"{folder / CONFIG}: expected no activation 'relu' beside the thresholds in {names[0]}")
    return layers, found, None


def _by_thresholds(folder: Path, layers: list[dict[str, LazyTensor]]) -> Literal["jumprelu", "relu"]:
    has = the_same(folder, "activation (a threshold or none)", ["threshold" in layer for layer in layers])
    return "jumprelu" if has else "relu"
