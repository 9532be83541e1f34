"""Devices by name, and working memory that suits them."""

from typing import NamedTuple

import torch


def resolve(name: str) -> torch.device:
    """The device of a name; "auto": CUDA where there is one."""
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


class Budget(NamedTuple):
    """Bytes to work in: on a CPU about what its caches hold, on a GPU enough to keep it busy."""

    cpu: int
    gpu: int

    def on(self, device: torch.device) -> int:
        return self.cpu if device.type == "cpu" else self.gpu
