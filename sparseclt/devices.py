"""Devices by name, and working memory that suits them."""

from typing import NamedTuple

import torch


def resolve(name: str) -> torch.device:
    """The device of a name; "auto": CUDA if there is one, else the CPU. Raises ValueError for an unknown name."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected 'auto' or a device of torch, got {name!r}") from error


class Budget(NamedTuple):
    """Bytes to work in: on a CPU about what its caches hold, on a GPU enough to keep it busy."""

    cpu: int
    gpu: int

    def on(self, device: torch.device) -> int:
        return self.cpu if device.type == "cpu" else self.gpu
