"""safetensors files written a piece, and read a tensor, at a time.

`safetensors.torch.save_file` (0.8.0) writes contiguous CPU tensors from where they lie, but first copies all that are
on a GPU, and takes no views; `load_file` reads all tensors at once.

The format (github.com/huggingface/safetensors): the header's length in 8 bytes, little-endian; the header, JSON that
gives each tensor's dtype, shape and place; the tensors' bytes. Read back by any reader of safetensors.
"""

import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseclt.parallel import ALONE, Group
from sparseclt.storage.json_files import CheckpointError, naming, parse_object
from sparseclt.storage.parts import Part, make_file, write_together

LONGEST_HEADER = 16 << 20  # bytes; ours have a hundred for each tensor
PIECE_BYTES = 16 << 20  # copied to the CPU at a time
NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_file(tensors: Mapping[str, Tensor | Part], path: Path, group: Group = ALONE) -> None:
    """Write `tensors`, each a view of any kind on any device, with a few MiB of memory beside them.

    The ranks of a `group` write one file together: the first of them what all have alike, each its share of the rows of
    a `Part`. An error on one of them is an OSError on all.
    Raises ValueError for a dtype that the format has no name for here, or on a big-endian machine.
    """
    if sys.byteorder != "little":
        raise ValueError("safetensors files are little-endian: expected such a machine to write them")
    header: dict[str, dict[str, Any]] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise ValueError(f"tensors[{name!r}]: expected one of {list(NAMES)}, got {tensor.dtype}")
        end = offset + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    if group.alone:
        with naming(path), path.open("wb") as file:
            file.write(start)
            for tensor in tensors.values():
                for piece in _bytes_of(tensor):
                    file.write(piece)
        return
    make_file(path, start, len(start) + offset, group)
    offsets = [len(start) + entry["data_offsets"][0] for entry in header.values()]
    write_together(
        path, ((at, tensor, _bytes_of(tensor)) for at, tensor in zip(offsets, tensors.values(), strict=True)), group
    )


def _bytes_of(tensor: Tensor | Part) -> Iterator[memoryview]:
    """The bytes of a tensor, or of this rank's share of its rows, in one buffer that is used again and again."""
    room = torch.empty(max(PIECE_BYTES, 8), dtype=torch.uint8)  # a scalar has up to 8 bytes
    for rows in tensor.share(PIECE_BYTES) if isinstance(tensor, Part) else [tensor]:
        for piece in _pieces(rows.detach()):
            own = room[: piece.numel() * piece.element_size()]
            own.view(piece.dtype).view(piece.shape).copy_(piece)
            yield own.numpy().data


def check_tensor(name: str, tensor: Tensor | Part) -> None:
    if not isinstance(tensor, Tensor | Part):
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
        with _opened(file) as tensors:
            return tensors.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def place(self, name: str) -> str:
        """Where a tensor lies, for errors: "W_enc_0.safetensors: W_enc_0" with the whole path."""
        file, stored = self._places[name]
        return f"{file}: {stored}"

    def check(self, name: str, dtypes: Collection[torch.dtype], shape: Sequence[int | None]) -> None:
        """That the tensor is there with one of `dtypes` and `shape`, of which None stands for any size. Only the
        header of its file is read. Raises CheckpointError, naming the file."""
        if name not in self._places:
            folder = next((str(file.parent) for file, _ in self._places.values()), "the checkpoint")
            raise CheckpointError(f"{folder} lacks the tensor {name!r}: expected one of shape {_text(shape)}")
        dtype, got = self._header(name)
        expected = [NAMES[dtype] for dtype in dtypes]
        if dtype not in expected:
            raise CheckpointError(f"{self.place(name)} is of dtype {dtype}, expected {' or '.join(expected)}")
        if len(got) != len(shape) or any(b not in (None, a) for a, b in zip(got, shape, strict=True)):
            raise CheckpointError(f"{self.place(name)} has shape {_text(got)}, expected {_text(shape)}")

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, by the header of its file."""
        return self._header(name)[1]

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as its file names it ("F32"), by the header of its file."""
        return self._header(name)[0]

    def _header(self, name: str) -> tuple[str, tuple[int, ...]]:
        file, stored = self._places[name]
        with _opened(file) as tensors:
            part = tensors.get_slice(stored)
            return part.get_dtype(), tuple(part.get_shape())

    def copy_into(self, name: str, target: Tensor | Part) -> None:
        """Fill `target` with the tensor, or with the part of it that this rank has. Raises CheckpointError unless it
        has the shape and the dtype of `target`."""
        self.check(name, [target.dtype], target.shape)
        if isinstance(target, Part):
            target.own.copy_(self.part(name, target.place()))
        else:
            target.copy_(self[name])

    def part(self, name: str, place: tuple[slice, ...]) -> Tensor:
        """The part of a tensor that lies at `place`, one slice for each of its axes; no more of it is read."""
        file, stored = self._places[name]
        with _opened(file) as tensors:
            return tensors.get_slice(stored)[place]


def _text(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in shape)}]"


def stored_names(file: Path) -> list[str]:
    """The names of the tensors in a file.

    Raises CheckpointError, naming the file, if it is no safetensors file or names a tensor twice.
    """
    _check_header(file)
    with _opened(file) as tensors:
        return list(tensors.keys())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """`safe_open`, which checks that every tensor has its own bytes within the file."""
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}): use another checkpoint") from error


def _check_header(file: Path) -> None:
    """That the header is not too long to be read, nor names a tensor twice, of which `safe_open` takes the last."""
    with naming(file), file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > LONGEST_HEADER:
            raise CheckpointError(
                f"{file} is not a safetensors file of ours: its header has {length} bytes, expected at most "
                f"{LONGEST_HEADER}"
            )
        header = stream.read(length)
    parse_object(header, file)
