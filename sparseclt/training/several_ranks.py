"""The ranks of a run: what they cannot do together, and what only some of them do."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.devices import usable
from sparseclt.model.activations import Activations
from sparseclt.model.modules import Latents
from sparseclt.parallel import Group, Ranks
from sparseclt.parallel.collectives import gather_rows
from sparseclt.training.interruption import StopRequest

T = TypeVar("T")


def processes() -> int:
    """How many processes run this program together: those that `torchrun` started."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def device_of(name: str) -> torch.device:
    """The device of `name` for this process: of several on one machine, each has its own GPU."""
    device = usable(name)
    if device.type == "cuda" and device.index is None and processes() > 1:
        return usable(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    return device


def on_ranks(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """`config` with the grid that was formed in the place of what it left open."""
    return replace(config, parallel=replace(config.parallel, latents=ranks.latents.size, data=ranks.data.size))


def check_supported(config: TrainConfig, data: int) -> None:
    """A ValueError for what would need more exchanges between `data` ranks than there are."""
    if config.batch_rows % data:
        raise ValueError(f"batch_rows: expected a multiple of parallel.data = {data}, got {config.batch_rows}")
    if config.loss.interaction_weight:
        raise ValueError(
            f"loss.interaction_weight: expected 0 on several ranks, of which none has the rows of whole decoders, got "
            f"{config.loss.interaction_weight}"
        )
    c = config.connections
    if c.policy == "learned" and c.exchange_share:
        raise ValueError(
            f"connections.exchange_share: expected 0 on several ranks, which cannot exchange candidates yet, got "
            f"{c.exchange_share}"
        )
    if c.policy in ("learned", "dense-learned") and c.open_per_latent is not None:
        raise ValueError(
            f"connections.open_per_latent: expected None on several ranks, each of which sees only its own latents, "
            f"got {c.open_per_latent}"
        )
    if data == 1:
        return
    if config.activations.shuffle_bytes:
        raise ValueError(
            f"activations.shuffle_bytes: expected 0 with parallel.data = {data}, whose ranks capture different rows, "
            f"got {config.activations.shuffle_bytes}"
        )
    if config.clt.activation != "topk":
        raise ValueError(
            f"clt.activation: expected 'topk' with parallel.data = {data}, as the others choose among the tokens of a "
            f"whole batch, got {config.clt.activation!r}; give parallel.data 1"
        )


@contextmanager
def in_turn(ranks: Ranks) -> Iterator[None]:
    """The first rank runs the block, then the others do: they find what it left on disk."""
    if not ranks.first:
        ranks.world.wait()
    try:
        yield
    finally:
        if ranks.first:
            ranks.world.wait()


def decided(ranks: Ranks, function: Callable[[], T]) -> T:
    """What `function` gives on the first rank, on all of them; or its error."""
    if ranks.world.alone:
        return function()
    answer: tuple[bool, Any] = True, None
    if ranks.first:
        try:
            answer = True, function()
        except Exception as error:
            answer = False, error
    good, value = ranks.world.objects(answer)[0]
    if not good:
        raise value
    result: T = value
    return result


def agree_to_stop(ranks: Ranks, request: StopRequest, late: bool) -> bool:
    """All ranks take down a signal that one of them got; returns whether a checkpoint is `late` on any."""
    if ranks.world.alone:
        return late
    signals = ranks.world.objects((request.signal, late))
    request.signal = next((number for number, _ in signals if number), None)
    return any(is_late for _, is_late in signals)


def broadcast(activations: Activations | None, group: Group, device: torch.device) -> Activations:
    """The activations of the first rank of `group`, on all of its ranks."""
    if group.alone:
        assert activations is not None
        return activations
    header = [_header(activations) if activations is not None else None]
    dist.broadcast_object_list(header, group.source, group=group.process_group, device=device)
    assert header[0] is not None
    values: dict[str, Any] = dict(header[0])
    for name, value in values.items():
        own = getattr(activations, name) if activations is not None else None
        if isinstance(value, list):
            values[name] = [_received(form, own[i] if own else None, group, device) for i, form in enumerate(value)]
        elif isinstance(value, _Form):
            values[name] = _received(value, own, group, device)
    return activations if activations is not None else Activations(**values)


class _Form(tuple[tuple[int, ...], torch.dtype]):
    """The shape and dtype of a tensor that is to come."""


def _header(activations: Activations) -> dict[str, object]:
    def form(value: object) -> object:
        if isinstance(value, Tensor):
            return _Form((tuple(value.shape), value.dtype))
        return [form(entry) for entry in value] if isinstance(value, list) else value

    return {field.name: form(getattr(activations, field.name)) for field in fields(activations)}


def _received(form: _Form, own: Tensor | None, group: Group, device: torch.device) -> Tensor:
    shape, dtype = form
    return group.broadcast_(own.contiguous() if own is not None else torch.empty(shape, dtype=dtype, device=device))


def of_whole_batch(latents: list[Latents], data: Group) -> list[Latents]:
    """Each module's latents [N, K] of all tokens of a batch, of which the ranks of `data` have consecutive rows."""
    return [Latents(*(gather_rows(tensor, data) for tensor in of_module)) for of_module in latents]
