"""The ranks of a run: what they cannot do together, and what only some of them do."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.devices import usable
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.language_model.over_ranks import LanguageModelOfRanks
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


def language_model_of_ranks(
    config: TrainConfig, ranks: Ranks, device: torch.device, given: LanguageModel | None = None
) -> LanguageModel:
    """The language model of `config`, or the one that is `given`, in the memory of only the first of the ranks that
    share a CLT, on its own device or on one of `parallel.model_devices`; for a CLT on `device`."""
    elsewhere = config.parallel.model_devices
    place = elsewhere[ranks.data.rank % len(elsewhere)] if elsewhere else str(device)
    model = None
    try:
        if ranks.latents.rank == 0:
            model = given or LanguageModel.of(replace(config, device=place))
    finally:
        ranks.patient.wait()  # until all that load one have it
    if model is not None and ranks.latents.alone and not elsewhere:
        return model
    return LanguageModelOfRanks(model, ranks.latents, device)


@contextmanager
def in_turn(ranks: Ranks) -> Iterator[None]:
    """The first rank runs the block, then the others do: they find what it left on disk."""
    if not ranks.first:
        ranks.patient.wait()
    try:
        yield
    finally:
        if ranks.first:
            ranks.patient.wait()


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


def of_whole_batch(latents: list[Latents], data: Group) -> list[Latents]:
    """Each module's latents [N, K] of all tokens of a batch, of which the ranks of `data` have consecutive rows."""
    return [Latents(*(gather_rows(tensor, data) for tensor in of_module)) for of_module in latents]


def gradients_of_whole_batch(parts: list[Tensor], ranks: Ranks) -> list[Tensor]:
    """The same of the gradients of latents, of which the ranks that share the CLT have a part each."""
    return [gather_rows(ranks.latents.sum_(part), ranks.data) for part in parts]
