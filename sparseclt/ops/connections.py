"""Which upstream latents each downstream latent reads."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparseclt.ops._torch_rows import Transpose, transpose
from sparseclt.ops.checks import check_indices, check_range
from sparseclt.ops.registration import Operator


@dataclass(frozen=True, eq=False)
class Connections:
    """Connections of a module: `indices` [F, C] int32 or int64, ids in 0..U-1 over all earlier modules side by side,
    -1 for an empty slot.

    `upstream` is U. The indices are checked once, here (not while compiling), and must not change afterwards: they are
    sorted by upstream latent when that is first needed, and the order is kept.
    Raises TypeError (not int32 or int64), ValueError (not [F, C], an id out of range or twice in a row).
    """

    indices: Tensor
    upstream: int

    def __post_init__(self) -> None:
        check_indices("connections", self.indices)
        if self.indices.ndim != 2:
            raise ValueError(f"connections: expected shape [F, C], got {tuple(self.indices.shape)}")
        if self.upstream < 0:
            raise ValueError(f"upstream: expected a number of latents >= 0, got {self.upstream}")
        if not torch.compiler.is_compiling():
            check_range("connections", self.indices, self.upstream, "upstream latents")
            check_distinct(self.indices)

    @property
    def F(self) -> int:
        """Downstream latents."""
        return self.indices.shape[0]

    @property
    def C(self) -> int:
        """Slots per downstream latent."""
        return self.indices.shape[1]

    @property
    def transposed(self) -> Transpose:
        """The slots sorted by upstream latent (CSC). Kept; inside `torch.compile` sorted at each call, unless it was
        asked for before."""
        if torch.compiler.is_compiling() and "_transposed" not in self.__dict__:
            return transpose(self.indices, self.upstream)
        return self._transposed

    @cached_property
    def _transposed(self) -> Transpose:
        return transpose(self.indices, self.upstream)


def check_distinct(indices: Tensor) -> None:
    """No row names an upstream latent twice: kernels write the connections of an upstream latent side by side."""
    ids = indices.sort(1).values
    twice = (ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)
    if twice.any():
        row, slot = twice.nonzero()[0].tolist()
        raise ValueError(
            f"connections: expected distinct ids in each row (besides -1, empty), got {int(ids[row, slot])} twice in"
            f" row {row}; add up its weights and set the other slot to -1"
        )


def as_connections(connections: Tensor | Connections, upstream: int | None) -> Connections:
    """A bare tensor is checked and wrapped, which needs `upstream`; an object must agree with it."""
    if not isinstance(connections, Connections):
        if upstream is None:
            raise ValueError(
                "upstream: expected the number of upstream latents U with a bare tensor, got None;"
                " pass upstream=U or a Connections object"
            )
        return Connections(connections, upstream)
    if upstream is not None and upstream != connections.upstream:
        raise ValueError(f"upstream: expected {connections.upstream}, as in connections, got {upstream}")
    return connections


def csc(
    connections: Connections, operator: Operator, backend: str, *differentiated: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """`order` and `starts` of the connections for an operator, None where neither of its passes reads them.

    The backward pass reads them if one of `differentiated` has a gradient, the forward pass of some backends always.
    """
    gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in differentiated)
    if gradient or operator.implementation(backend).reads_order:
        return connections.transposed
    return None, None
