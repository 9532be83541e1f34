"""Counts where a GPU would make the host wait: numbers read from tensors, and results whose size depends on values."""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# On a GPU each of these waits for the device; so do masks as indices, which are known by their dtype.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
}
OURS = ("sparseclt", "csrc_triton")


class Waits(TorchDispatchMode):
    """While active, counts waits by the module of ours that caused them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_module: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put_", "index_put") else []
        masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
        filled = name != "index" and len(args[2:3]) == 1 and args[2].numel() == 1 if masks else False  # masked_fill
        sized = name != "repeat_interleave" or (kwargs or {}).get("output_size") is not None
        if name in WAITING or (masks and not filled) or not sized:
            self.by_module[_module()] += 1
        return func(*args, **(kwargs or {}))


def _module() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in OURS:
            return name
        frame = frame.f_back
    return "elsewhere"
