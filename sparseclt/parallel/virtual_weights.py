"""Virtual weights of encoder rows and decoder columns that are spread over ranks: no decoder row ever moves."""

import torch.distributed as dist
from torch import Tensor

from sparseclt import ops
from sparseclt.parallel.collectives import gather_rows, scatter_rows, to_columns
from sparseclt.parallel.group import Group


def virtual_weights(
    W_enc: Tensor,
    E: Tensor,
    connections: Tensor | ops.Connections,
    *,
    group: Group | dist.ProcessGroup | None,
    all_connections: ops.Connections | None = None,
    backend: str | None = None,
) -> Tensor:
    """Virtual weights of this rank's kept connections: V [F/n, C], 0 at empty slots.

    Equivalent to this rank's rows of `ops.virtual_weights(all W_enc, all E, all connections)`. The ranks exchange their
    rows of `W_enc` for columns, each computes its columns' part of V [F, C], and these parts are added up where their
    rows belong: a rank sends about F D / n + F C numbers, and receives as many. Differentiable in `W_enc` and `E`.

    `W_enc` [F/n, D]: this rank's rows; `E` [U, D/n]: this rank's columns of all effective decoders; `connections`
    [F/n, C]: of this rank's rows, ids in 0..U-1 or -1. `all_connections` [F, C]: those of all ranks, where they are at
    hand; otherwise they are gathered. `group`: a `torch.distributed` process group, or None for one rank. `backend`
    and errors as in `ops.virtual_weights`.
    """
    group = Group.of(group)
    if group.alone:
        return ops.virtual_weights(W_enc, E, connections, backend=backend)
    if all_connections is None:
        all_connections = gathered(ops.Connections(as_tensor(connections), len(E)), group)
    V = ops.virtual_weights(to_columns(W_enc, group), E, all_connections, backend=backend)
    return scatter_rows(V, group)


def as_tensor(connections: Tensor | ops.Connections) -> Tensor:
    return connections.indices if isinstance(connections, ops.Connections) else connections


def gathered(connections: ops.Connections, group: Group) -> ops.Connections:
    """The connections [F, C] of all ranks' rows, of this rank's [F/n, C]; C must be the same on all ranks."""
    if group.alone:
        return connections
    return ops.Connections(gather_rows(connections.indices, group), connections.upstream)
