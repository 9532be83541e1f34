"""A SparseCLT as named tensors on disk: what `SparseCLT.save_pretrained` writes and `from_pretrained` reads."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sparseclt.model.attention import AttentionWeights
from sparseclt.model.clt import Architecture, SparseCLT
from sparseclt.model.modules import Transcoder
from sparseclt.storage import checkpoint


def _prefix(module: Transcoder) -> str:
    return f"{module.site.kind}.{module.site.layer}."


def clt_tensors(clt: SparseCLT) -> dict[str, Tensor]:
    """Everything a CLT is, by name: "mlp.0.W_enc" and so on. Views of the parameters, nothing copied."""
    tensors: dict[str, Tensor] = {}
    for module in clt:
        parts: dict[str, Tensor | None] = {
            "W_enc": module.W_enc,
            "b_enc": module.b_enc,
            "W_dec": module.W_dec if module.site.kind == "mlp" else module.W_dec[:, 0],
            "b_dec": module.b_dec,
            "connections": module.connections.indices.int() if module.connections else None,
            "logits": module.logits,
        }
        weights = clt.attention_of(module.site)
        if weights is not None:
            parts |= {"W_V": weights.W_V, "W_O": weights.W_O, "bias": weights.bias}
        tensors |= {_prefix(module) + name: part.detach() for name, part in parts.items() if part is not None}
    return tensors


@torch.no_grad()
def load_clt_tensors(clt: SparseCLT, tensors: Mapping[str, Tensor]) -> None:
    """Take over the tensors of a CLT of the same architecture."""
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


def write_clt(directory: Path, clt: SparseCLT) -> None:
    """Write `clt` into `directory`, which the caller makes atomic."""
    checkpoint.save_clt(directory, clt.describe(), clt_tensors(clt))


def save_pretrained(clt: SparseCLT, path: Path) -> Path:
    with checkpoint.atomic_directory(path) as directory:
        write_clt(directory, clt)
    return path


def from_pretrained(path: Path) -> SparseCLT:
    config, tensors = checkpoint.load_clt(path)
    architecture = Architecture(**config)
    attention = None
    if architecture.attention == "latents":
        attention = [
            AttentionWeights(
                tensors[f"attn.{layer}.W_V"],
                tensors[f"attn.{layer}.W_O"],
                tensors[f"attn.{layer}.bias"],
                architecture.centred,
            )
            for layer in range(architecture.layers)
        ]
    clt = SparseCLT(architecture, attention)
    load_clt_tensors(clt, tensors)
    return clt
