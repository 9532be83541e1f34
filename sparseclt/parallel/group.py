"""A group of ranks: the part that each of them holds, and what they send each other."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Their names since torch 2.13, before which they were called otherwise.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Group:
    """Ranks 0 to `size` - 1 that work together, and which of them this process is.

    Without a `process_group` a rank is by itself, and every exchange gives back what it was given.

    `sent`: bytes that this rank has sent so far, by kind of collective, as algorithms that send the fewest do: of a
    tensor of b bytes over n ranks, (n - 1) b for an all-gather, (n - 1) / n b for a reduce-scatter and an all-to-all,
    2 (n - 1) / n b for an all-reduce. A broadcast counts b at its source.
    """

    def __init__(self, rank: int = 0, size: int = 1, process_group: "dist.ProcessGroup | None" = None):
        self.rank, self.size, self.process_group = rank, size, process_group
        self.sent: Counter[str] = Counter()

    @classmethod
    def of(cls, process_group: "Group | dist.ProcessGroup | None") -> "Group":
        """The group of a `torch.distributed` process group; None: that of a rank by itself."""
        if process_group is None:
            return ALONE
        if isinstance(process_group, Group):
            return process_group
        return cls(dist.get_rank(process_group), dist.get_world_size(process_group), process_group)

    def __deepcopy__(self, memo: object) -> "Group":
        return self  # a copy of a CLT is on the same ranks

    @property
    def alone(self) -> bool:
        """Whether there is no other rank to send anything to."""
        return self.size == 1

    @property
    def source(self) -> int:
        """The rank 0 of this group, as `torch.distributed` numbers all processes."""
        return 0 if self.process_group is None else dist.get_global_rank(self.process_group, 0)

    def part(self, total: int, name: str) -> slice:
        """This rank's share of `total` rows or columns. Raises ValueError, naming them, if that is no whole number."""
        if total % self.size:
            raise ValueError(
                f"{name}: expected a multiple of {self.size}, the ranks that share them, got {total}; choose another "
                f"number, or another number of ranks (parallel.latents)"
            )
        each = total // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, in place."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max_(self, tensor: Tensor) -> Tensor:
        """The elementwise maximum of the ranks' tensors, in place; of booleans: whether any of them is true."""
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.alone:
            return tensor
        self._note("all_reduce", 2 * _bytes(tensor) * (self.size - 1) // self.size)
        whole = tensor.contiguous()
        dist.all_reduce(whole, operation, group=self.process_group)
        return tensor if whole is tensor else tensor.copy_(whole)

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors, all of one shape, side by side: [n, ...]."""
        if self.alone:
            return tensor[None]
        self._note("all_gather", _bytes(tensor) * (self.size - 1))
        found = tensor.new_empty(self.size, *tensor.shape)
        _all_gather(found.view(-1), tensor.contiguous().view(-1), group=self.process_group)
        return found

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Of parts [n, ...], one for each rank: the sum over ranks of the part that is this rank's."""
        if self.alone:
            return parts[0]
        self._note("reduce_scatter", _bytes(parts) * (self.size - 1) // self.size)
        mine = parts.new_empty(parts.shape[1:])
        _reduce_scatter(mine.view(-1), parts.contiguous().view(-1), group=self.process_group)
        return mine

    def exchange(self, parts: Tensor) -> Tensor:
        """Of parts [n, ...], one for each rank: those that the ranks had for this one, [n, ...]."""
        if self.alone:
            return parts
        self._note("all_to_all", _bytes(parts) * (self.size - 1) // self.size)
        parts = parts.contiguous()
        found = torch.empty_like(parts)
        dist.all_to_all_single(found.view(-1), parts.view(-1), group=self.process_group)
        return found

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, in place on all others."""
        if not self.alone:
            self._note("broadcast", _bytes(tensor) if self.rank == 0 else 0)
            dist.broadcast(tensor, self.source, group=self.process_group)
        return tensor

    def objects(self, value: Any) -> list[Any]:
        """A small value of each rank, in their order."""
        values = [value] * self.size
        if not self.alone:
            dist.all_gather_object(values, value, group=self.process_group)
        return values

    def wait(self) -> None:
        """Returns when all ranks have come here."""
        if not self.alone:
            dist.barrier(group=self.process_group)

    def _note(self, kind: str, sent: int) -> None:
        self.sent[kind] += sent


ALONE = Group()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
