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


def usable(name: str) -> torch.device:
    """`resolve`, for a device to compute on now. Raises ValueError for a CUDA device that is not there, too."""
    device = resolve(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: expected one that this machine has, got {name!r}, but it has {torch.cuda.device_count()} CUDA "
            f"devices; give another one, or auto"
        )
    return device


class Budget(NamedTuple):
    """Bytes to work in: on a CPU about what its caches hold, on a GPU enough to keep it busy."""

    cpu: int
    gpu: int

    def on(self, device: torch.device) -> int:
        return self.cpu if device.type == "cpu" else self.gpu
