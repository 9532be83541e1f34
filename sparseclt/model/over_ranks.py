"""Activations that several ranks need, or of which each has its rows."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from sparseclt.model.activations import Activations
from sparseclt.parallel.collectives import gather_rows
from sparseclt.parallel.from_first import from_first
from sparseclt.parallel.group import Group


def counted_by_all(activations: Activations, data: Group) -> int:
    """How many tokens count on all ranks of `data`, each of which has its own rows."""
    own = activations.counted_tokens
    return own if data.alone else int(data.sum_(torch.tensor(own, device=activations.tokens.device)))


def rows_of_all(activations: Activations, data: Group) -> Activations:
    """The activations of the rows of all ranks, in their order."""
    return activations if data.alone else activations.mapped(lambda rows: gather_rows(rows, data))


def broadcast(activations: Activations | None, group: Group, device: torch.device) -> Activations:
    """The activations of the first rank of `group`, on all of its ranks; None on the others."""
    own, form = None, {}
    if activations is not None:
        values = {field.name: getattr(activations, field.name) for field in fields(activations)}
        own = [t for v in values.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
        # Of a list its length, of a tensor nothing.
        form = {n: len(v) if isinstance(v, list) else None if isinstance(v, Tensor) else [v] for n, v in values.items()}
    form, found = from_first(group, device, own, form)
    if activations is not None:
        return activations
    tensors = iter(found)
    rebuilt: dict[str, Any] = {}
    for name, entry in form.items():
        if isinstance(entry, int):
            rebuilt[name] = [next(tensors) for _ in range(entry)]
        else:
            rebuilt[name] = next(tensors) if entry is None else entry[0]
    return Activations(**rebuilt)
