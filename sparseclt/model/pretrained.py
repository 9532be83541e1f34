"""A CLT as named tensors on disk: what `SparseCLT.save_pretrained` writes and `from_pretrained` reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparseclt.model.attention import AttentionWeights
from sparseclt.model.modules import Transcoder
from sparseclt.model.shape import Architecture
from sparseclt.model.stored_shapes import check_tensors
from sparseclt.model.transcoders import Transcoders
from sparseclt.storage import clt_files
from sparseclt.storage.directories import MANIFEST, CheckpointError
from sparseclt.storage.parts import Axis, Part, part, shared_directory
from sparseclt.storage.safetensors_stream import TensorFiles

# What a rank has of the tensors that ranks share.
AXES: dict[str, Axis] = {
    "W_enc": "rows", "b_enc": "rows", "W_dec": "columns", "connections": "rows", "logits": "rows",
    "threshold": "rows", "threshold_sparse": "rows",
}  # fmt: skip


class Foreign(Protocol):
    """A CLT as another tool stored it."""

    def clt(self, language_model: Any, active: int | None, input_hook: str | None) -> tuple[Architecture, TensorFiles]:
        """Its architecture and tensors as a CLT of ours; the arguments are those of `SparseCLT.from_pretrained`."""


# What opens the directories of other tools, or returns None; put here by `sparseclt.formats.registry`.
OPENERS: list[Callable[[Path], Foreign | None]] = []


def _foreign(path: Path) -> Foreign | None:
    """The CLT in directory `path` if another tool laid it out."""
    if not path.is_dir() or (path / clt_files.CONFIG).exists() or _lists_our_config(path / MANIFEST):
        return None
    return next((found for opened in OPENERS if (found := opened(path)) is not None), None)


def _lists_our_config(manifest: Path) -> bool:
    """Whether a file is missing that made the directory one of ours."""
    return manifest.is_file() and clt_files.CONFIG.encode() in manifest.read_bytes()


def _prefix(module: Transcoder) -> str:
    return f"{module.site.kind}.{module.site.layer}."


def named_tensors(clt: Transcoders) -> dict[str, Tensor | Part]:
    """Everything a CLT is, by name: "mlp.0.W_enc" and so on. Views of the parameters, nothing copied."""
    tensors: dict[str, Tensor | Part] = {}
    for module in clt:
        parts: dict[str, Tensor | None] = {
            "W_enc": module.W_enc,
            "b_enc": module.b_enc,
            "W_dec": module.W_dec if module.site.kind == "mlp" else module.W_dec[:, 0],
            "b_dec": module.b_dec,
            "connections": None if module.connection_indices is None else module.connection_indices.int(),
            "logits": module.logits,
            "threshold": module.threshold,
            "threshold_sparse": module.threshold_sparse,
        }
        weights = clt.attention_of(module.site)
        if weights is not None:
            parts |= {"W_V": weights.W_V, "W_O": weights.W_O, "bias": weights.bias}
        for name, own in parts.items():
            if own is not None:
                tensors[_prefix(module) + name] = part(own.detach(), AXES.get(name), clt.ranks.latents)
    return tensors


@torch.no_grad()
def load_tensors(clt: Transcoders, tensors: TensorFiles) -> None:
    """Copy in the tensors of a CLT of the same architecture.

    Raises CheckpointError, naming the file, for tensors of other shapes and connections that are out of range.
    """
    check_tensors(clt.architecture, tensors)
    for module in clt:
        prefix = _prefix(module)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            parameter = getattr(module, name)
            parameter.copy_(_own(module, tensors, name).view_as(parameter))
        for name in ("threshold", "threshold_sparse"):
            if (threshold := getattr(module, name)) is not None:
                threshold.copy_(_own(module, tensors, name))
        device = module.W_enc.device
        if prefix + "connections" in tensors:
            try:
                module.connect(_own(module, tensors, "connections").to(device))
            except ValueError as error:
                raise CheckpointError(f"{tensors.place(prefix + 'connections')}: {error}") from error
        if prefix + "logits" in tensors:
            if module.logits is None:
                module.logits = nn.Parameter(_own(module, tensors, "logits").to(device))
            else:
                tensors.copy_into(prefix + "logits", part(module.logits, "rows", module.group))


def _own(module: Transcoder, tensors: TensorFiles, name: str) -> Tensor:
    """A module's tensor, or the part of it that this rank has."""
    stored = _prefix(module) + name
    if module.group.alone or name not in AXES:
        return tensors[stored]
    if AXES[name] == "rows":
        return tensors.part(stored, (module.rows,))
    every = [slice(None)] * (len(tensors.shape(stored)) - 1)
    return tensors.part(stored, (*every, module.columns))


def write(directory: Path, clt: Transcoders) -> None:
    """Write `clt` into `directory`, which the caller makes atomic."""
    architecture = clt.architecture
    config = {"model_name": architecture.model.name, **architecture.to_dict()}
    clt_files.save_clt(
        directory, config, named_tensors(clt), mlp_input=architecture.model.mlp_input, group=clt.ranks.latents
    )


def save(clt: Transcoders, path: Path) -> Path:
    """Write `clt` to directory `path`, whole or not at all."""
    with shared_directory(path, clt.ranks) as directory:
        if directory is not None:
            write(directory, clt)
    return path


def read(path: Path, **options: Any) -> tuple[Architecture, list[AttentionWeights] | None, TensorFiles]:
    """The architecture, the OV circuits (for attention latents) and the tensors of the CLT in directory `path`, which
    may be another tool's; the options are those of `from_pretrained`."""
    if (foreign := _foreign(path)) is not None:
        architecture, tensors = foreign.clt(**options)
        return architecture, None, tensors
    given = sorted(name for name, value in options.items() if value is not None)
    if given:
        raise ValueError(f"{given[0]}: expected None for {path}, which is no directory of another tool")
    config, tensors = clt_files.load_clt(path)
    try:
        architecture = Architecture.from_dict({name: value for name, value in config.items() if name != "model_name"})
    except ValueError as error:
        problems = "; ".join(str(error).splitlines())
        raise CheckpointError(f"{path / clt_files.CONFIG} is no CLT's configuration: {problems}") from error
    check_tensors(architecture, tensors)  # before anything of the sizes that it claims is made
    if architecture.attention == "frozen":
        return architecture, None, tensors
    centred = architecture.model.centred
    attention = [
        AttentionWeights(
            tensors[f"attn.{layer}.W_V"], tensors[f"attn.{layer}.W_O"], tensors[f"attn.{layer}.bias"], centred
        )
        for layer in range(architecture.model.layers)
    ]
    return architecture, attention, tensors


def dtype_of(tensors: TensorFiles) -> torch.dtype:
    """The dtype of the weights of a CLT on disk."""
    return tensors["mlp.0.W_enc"].dtype
