"""Tensors in the files of other tools, checked by their headers and read, and converted, when they are asked for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparseclt.model.stored_shapes import FLOATS
from sparseclt.storage.directories import CheckpointError, check_regular
from sparseclt.storage.safetensors_stream import NAMES, TensorFiles, stored_names


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk, and how it is read and converted to the `shape` and meaning that a CLT gives it."""

    file: Path
    stored: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    def converted(self, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] | None = None) -> "LazyTensor":
        """The tensor after `change`, of another shape where that is given."""
        read = self.read
        return replace(self, read=lambda: change(read()), shape=self.shape if shape is None else shape)

    @property
    def place(self) -> str:
        """Where it lies, for errors."""
        return f"{self.file}: {self.stored}"


class ForeignFiles:
    """The safetensors files, by names relative to `folder`, of a directory that another tool wrote.

    Raises CheckpointError, naming the file, for a link, a missing file, and one that is no safetensors file.
    """

    def __init__(self, folder: Path, files: Iterable[str]):
        self.folder = folder
        self.names: dict[str, list[str]] = {}
        places: dict[str, tuple[Path, str]] = {}
        for file in files:
            check_regular(folder, file)
            self.names[file] = stored_names(folder / file)
            places |= {f"{file}:{name}": (folder / file, name) for name in self.names[file]}
        self._tensors = TensorFiles(places)

    def tensor(self, file: str, name: str, shape: Sequence[int | None]) -> LazyTensor:
        """Tensor `name` of `file`, which has `shape` (None: any size) and a floating-point dtype by its header; else
        CheckpointError."""
        if name not in self.names[file]:
            raise CheckpointError(f"{self.folder / file} lacks the tensor {name!r}")
        key = f"{file}:{name}"
        self._tensors.check(key, FLOATS, shape)
        dtype = next(dtype for dtype, stored in NAMES.items() if stored == self._tensors.dtype(key))
        return LazyTensor(self.folder / file, name, dtype, self._tensors.shape(key), lambda: self._tensors[key])

    def check_known(self, file: str, known: Iterable[str]) -> None:
        """A CheckpointError if `file` holds a tensor of a name that is not `known`: it would be left out in silence."""
        unknown = sorted(set(self.names[file]) - set(known))
        if unknown:
            raise CheckpointError(f"{self.folder / file}: {unknown[0]!r} is a tensor that a SparseCLT has no place for")

    def check_zero(self, file: str, name: str, meaning: str) -> None:
        """A CheckpointError unless tensor `name` is absent or all zeros; `meaning` says what a CLT cannot hold."""
        if name in self.names[file] and bool(self._tensors[f"{file}:{name}"].any()):
            raise CheckpointError(f"{self.folder / file}: {name} is not zero, and a SparseCLT has no {meaning}")


def stacked(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Decoders [F, D], one for each target, as [F, T, D]."""
    F, D = parts[0].shape
    return replace(parts[0], shape=(F, len(parts), D), read=lambda: torch.stack([part.read() for part in parts], 1))


def summed(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The sum of tensors of one shape."""

    def read() -> Tensor:
        total = parts[0].read()
        for part in parts[1:]:
            total = total + part.read()
        return total

    return replace(parts[0], read=read)


class ConvertedTensors(TensorFiles):
    """The tensors of a CLT by the names that `SparseCLT` gives them, each converted when it is asked for."""

    def __init__(self, tensors: Mapping[str, LazyTensor]):
        super().__init__({name: (tensor.file, tensor.stored) for name, tensor in tensors.items()})
        self._lazy = dict(tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._lazy[name].read()

    def _header(self, name: str) -> tuple[str, tuple[int, ...]]:
        return NAMES[self._lazy[name].dtype], self._lazy[name].shape
