"""Tensors of which ranks have their parts, in files that hold the whole: readable on any number of ranks."""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sparseclt.parallel import Group, Ranks
from sparseclt.storage.directories import atomic_directory
from sparseclt.storage.json_files import naming

Axis = Literal["rows", "columns"]


class Part:
    """A tensor [F, ..., D] of which each rank of a group has its rows (axis 0) or its columns (the last axis), in the
    order of the ranks. `shape` and `dtype` are those of the whole."""

    def __init__(self, own: Tensor, axis: Axis, group: Group):
        self.own, self.axis, self.group = own, axis, group
        place = 0 if axis == "rows" else own.ndim - 1
        self.shape = tuple(size * (group.size if i == place else 1) for i, size in enumerate(own.shape))

    @property
    def dtype(self) -> torch.dtype:
        return self.own.dtype

    def place(self) -> tuple[slice, ...]:
        """Where this rank's part lies in the whole tensor."""
        axis = 0 if self.axis == "rows" else len(self.shape) - 1
        each = self.own.shape[axis]
        mine = slice(self.group.rank * each, (self.group.rank + 1) * each)
        return tuple(mine if i == axis else slice(None) for i in range(len(self.shape)))

    def share(self, most_bytes: int) -> Iterator[Tensor]:
        """This rank's share of the whole tensor's rows, in pieces of about `most_bytes`, for which columns are
        exchanged; to be taken on all ranks of the group together."""
        if self.axis == "rows":
            yield self.own
            return
        n = self.group.size
        by_rank = self.own.unflatten(0, (n, -1))  # [n, F/n, ..., D/n]: the rows that each rank will have
        row = n * by_rank[0, 0].numel() * self.own.element_size()
        size = max(1, most_bytes // max(1, row))
        for first in range(0, by_rank.shape[1], size):
            found = self.group.exchange(by_rank[:, first : first + size])  # [n, R, ..., D/n] of these rows, by column
            yield found.movedim(0, -2).flatten(-2)


def part(own: Tensor, axis: Axis | None, group: Group) -> Tensor | Part:
    """`own` as what a file takes: itself where all ranks have it alike, or where there is only one."""
    return own if axis is None or group.alone else Part(own, axis, group)


class RankError(OSError):
    """An error that one of several ranks had, on all of them."""


def agree(group: Group, error: Exception | None) -> None:
    """On all ranks an error if one of them had one; the first is named."""
    if group.alone:
        if error is not None:
            raise error
        return
    report = error if error is None or isinstance(error, RankError) else f"rank {group.rank} of {group.size}: {error}"
    first = next((text for text in group.objects(None if report is None else str(report)) if text), None)
    if first is not None:
        raise RankError(first) from error


@contextmanager
def shared_directory(path: Path, ranks: Ranks) -> Iterator[Path | None]:
    """`atomic_directory` for ranks that write their parts of its files: those of one grid row; the others get None.
    Only when all have written is the manifest made, by the first rank, and the directory put into its place. An error
    on one rank is an error on all, and leaves what was there before."""
    if ranks.world.alone:
        with atomic_directory(path) as directory:
            yield directory
        return
    error: Exception | None = None
    try:
        if ranks.first:
            with atomic_directory(path) as directory:
                ranks.world.objects(directory)
                yield directory
        else:
            directory = ranks.world.objects(None)[0]
            yield directory if ranks.data.rank == 0 else None
    except Exception as caught:
        error = caught
    agree(ranks.world, error)


def make_file(path: Path, start: bytes, size: int, group: Group) -> None:
    """A file of `size` bytes that begins with `start`, made by the first rank."""
    error: OSError | None = None
    if group.rank == 0:
        try:
            with naming(path), path.open("wb") as file:
                file.write(start)
                file.truncate(size)
        except OSError as caught:
            error = caught
    agree(group, error)


def write_together(
    path: Path, tensors: Iterable[tuple[int, Tensor | Part, Iterator[memoryview]]], group: Group
) -> None:
    """Write tensors into a file that is there: where each begins, and the bytes that this rank has of it. What all
    ranks have alike is written by the first."""
    error: OSError | None = None
    # An error is kept until all bytes have been taken, for which other ranks exchange columns with this one.
    with ExitStack() as stack:
        file = None
        try:
            file = stack.enter_context(path.open("r+b"))
        except OSError as caught:
            error = caught
        for start, tensor, pieces in tensors:
            if not isinstance(tensor, Part) and group.rank:
                continue
            at = start
            if isinstance(tensor, Part):
                at += group.rank * (math.prod(tensor.shape) * tensor.dtype.itemsize // group.size)
            for piece in pieces:
                try:
                    if file is not None and error is None:
                        file.seek(at)
                        at += file.write(piece)
                except OSError as caught:
                    error = caught
        try:
            if file is not None and error is None:
                file.flush()
                os.fsync(file.fileno())
        except OSError as caught:
            error = caught
    if error is not None and error.filename is None:
        error = OSError(error.errno, error.strerror, str(path))
    agree(group, error)
