"""A CLT as named tensors on disk: what `SparseCLT.save_pretrained` writes and `from_pretrained` reads."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseclt.model.attention import AttentionWeights
from sparseclt.model.modules import Transcoder
from sparseclt.model.shape import Architecture
from sparseclt.model.transcoders import Transcoders
from sparseclt.storage import clt_files
from sparseclt.storage.directories import atomic_directory


def _prefix(module: Transcoder) -> str:
    return f"{module.site.kind}.{module.site.layer}."


def named_tensors(clt: Transcoders) -> dict[str, Tensor]:
    """Everything a CLT is, by name: "mlp.0.W_enc" and so on. Views of the parameters, nothing copied."""
    tensors: dict[str, Tensor] = {}
    for module in clt:
        parts: dict[str, Tensor | None] = {
            "W_enc": module.W_enc,
            "b_enc": module.b_enc,
            "W_dec": module.W_dec if module.site.kind == "mlp" else module.W_dec[:, 0],
            "b_dec": module.b_dec,
            "connections": None if module.connection_indices is None else module.connection_indices.int(),
            "logits": module.logits,
        }
        weights = clt.attention_of(module.site)
        if weights is not None:
            parts |= {"W_V": weights.W_V, "W_O": weights.W_O, "bias": weights.bias}
        tensors |= {_prefix(module) + name: part.detach() for name, part in parts.items() if part is not None}
    return tensors


@torch.no_grad()
def load_tensors(clt: Transcoders, tensors: Mapping[str, Tensor]) -> None:
    """Copy in the tensors of a CLT of the same architecture."""
    for module in clt:
        prefix = _prefix(module)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            parameter = getattr(module, name)
            parameter.copy_(tensors[prefix + name].view_as(parameter))
        device = module.W_enc.device
        if prefix + "connections" in tensors:
            module.connect(tensors[prefix + "connections"].to(device))
        if prefix + "logits" in tensors:
            logits = tensors[prefix + "logits"].to(device)
            if module.logits is None:
                module.logits = nn.Parameter(logits)
            else:
                module.logits.copy_(logits)


def write(directory: Path, clt: Transcoders) -> None:
    """Write `clt` into `directory`, which the caller makes atomic."""
    architecture = clt.architecture
    config = {"model_name": architecture.model.name, **architecture.to_dict()}
    clt_files.save_clt(directory, config, named_tensors(clt))


def save(clt: Transcoders, path: Path) -> Path:
    """Write `clt` to directory `path`, whole or not at all."""
    with atomic_directory(path) as directory:
        write(directory, clt)
    return path


def read(path: Path) -> tuple[Architecture, list[AttentionWeights] | None, Mapping[str, Tensor]]:
    """The architecture, the OV circuits (for attention latents) and the tensors of the CLT in directory `path`."""
    config, tensors = clt_files.load_clt(path)
    architecture = Architecture.from_dict({name: value for name, value in config.items() if name != "model_name"})
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


def dtype_of(tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of the weights of a CLT on disk."""
    return tensors["mlp.0.W_enc"].dtype
