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


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 faster than fp32: GPUs from Ampere on. One that is not here, for which a run is
    planned, is taken for such a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return device.type == "cuda"
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


class Budget(NamedTuple):
    """Bytes to work in: on a CPU about what its caches hold; on a GPU a share of its memory, and at least `gpu`.

    Of all its memory, not of what is free: some results depend on where chunks begin.
    """

    cpu: int
    gpu: int
    gpu_share: float = 0.0

    def on(self, device: torch.device) -> int:
        if device.type == "cuda" and torch.cuda.is_available():
            return max(self.gpu, int(self.gpu_share * torch.cuda.get_device_properties(device).total_memory))
        return self.cpu if device.type == "cpu" else self.gpu
