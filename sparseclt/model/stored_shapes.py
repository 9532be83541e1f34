"""The tensors that a CLT on disk must hold, checked by the headers of its files before anything is allocated."""

import torch

from sparseclt.model.shape import Architecture
from sparseclt.storage.directories import CheckpointError
from sparseclt.storage.safetensors_stream import TensorFiles

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensors(architecture: Architecture, tensors: TensorFiles) -> None:
    """That every module of `architecture` has its tensors, in their shapes.

    Raises CheckpointError, naming the file, for one that is missing or has another shape or dtype.
    """
    L = architecture.model.layers
    # Counted first: a configuration may claim any number of layers.
    stored = sum(name.startswith("mlp.") and name.endswith(".W_enc") for name in tensors)
    if stored != L:
        folder = next((place.rsplit("/", 1)[0] for place in map(tensors.place, tensors)), "the checkpoint")
        raise CheckpointError(f"{folder}: expected W_enc files of {L} layers, as sparseclt.json says, found {stored}")
    for layer in range(L):
        _check_module(architecture, tensors, f"mlp.{layer}.", (architecture.targets_of(layer),))
        if architecture.attention == "latents":
            _check_module(architecture, tensors, f"attn.{layer}.", ())
            _check_attention(architecture, tensors, f"attn.{layer}.")


def _check_module(architecture: Architecture, tensors: TensorFiles, prefix: str, targets: tuple[int, ...]) -> None:
    F, D = architecture.latents, architecture.model.d_model
    shapes: dict[str, tuple[int | None, ...]] = {
        "W_enc": (F, D),
        "b_enc": (F,),
        "W_dec": (F, *targets, D),
        "b_dec": (D,),
    }
    if architecture.activation != "topk":
        shapes["threshold"] = (F,)
    if architecture.activation == "batchtopk":
        shapes["threshold_sparse"] = (F,)
    for name, shape in shapes.items():
        tensors.check(prefix + name, FLOATS, shape)
    if prefix + "connections" in tensors:
        tensors.check(prefix + "connections", [torch.int32], (F, None))
    if prefix + "logits" in tensors:
        slots = tensors.shape(prefix + "connections")[1] if prefix + "connections" in tensors else None
        tensors.check(prefix + "logits", FLOATS, (F, slots))


def _check_attention(architecture: Architecture, tensors: TensorFiles, prefix: str) -> None:
    D, H = architecture.model.d_model, architecture.model.heads or None
    tensors.check(prefix + "W_V", FLOATS, (H, D, None))
    tensors.check(prefix + "W_O", FLOATS, (H, None, D))
    tensors.check(prefix + "bias", FLOATS, (D,))
