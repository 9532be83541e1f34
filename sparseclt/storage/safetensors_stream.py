"""safetensors files written a piece, and read a tensor, at a time.

`safetensors.torch.save_file` (0.8.0) writes contiguous CPU tensors from where they lie, but first copies all that are
on a GPU, and takes no views; `load_file` reads all tensors at once.

The format (github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian; the header, JSON that
gives each tensor's dtype, shape and place; the tensors' bytes. Read back by any reader of safetensors.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

PIECE_BYTES = 16 << 20  # copied to the CPU at a time
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_file(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write `tensors`, each a view of any kind on any device, with a few MiB of memory beside them.

    Raises ValueError for a dtype that the format has no name for here, or on a big-endian machine.
    """
    if sys.byteorder != "little":
        raise ValueError("safetensors files are little-endian: expected such a machine to write them")
    header, offset = {}, 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensors[{name!r}]: expected one of {list(NAMES)}, got {tensor.dtype}")
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    room = torch.empty(max(PIECE_BYTES, 8), dtype=torch.uint8)  # a scalar has up to 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            for piece in _pieces(tensor.detach()):
                own = room[: piece.numel() * piece.element_size()]
                own.view(piece.dtype).view(piece.shape).copy_(piece)
                file.write(own.numpy().data)


def check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"tensors[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}")


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Parts of a tensor in the order of its elements, of at most PIECE_BYTES where its rows allow."""
    if tensor.ndim == 0 or tensor.numel() * tensor.element_size() <= PIECE_BYTES:
        yield tensor
        return
    row = tensor[0].numel() * tensor.element_size()
    if row > PIECE_BYTES:
        for part in tensor:
            yield from _pieces(part)
        return
    yield from tensor.split(max(1, PIECE_BYTES // row))


class TensorFiles(Mapping[str, Tensor]):
    """Tensors on disk by name, each read, onto the CPU, when it is asked for."""

    def __init__(self, places: Mapping[str, tuple[Path, str]]):
        self._places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def stored_names(file: Path) -> list[str]:
    """The names of the tensors in a file."""
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())
