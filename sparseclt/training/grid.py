"""The grid of the processes that run a configuration together: how many share the CLT, and how many its batches."""

import os
from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sparseclt.config import TrainConfig
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.shape import ModelShape
from sparseclt.parallel import ONE_RANK, Group, Ranks
from sparseclt.training import memory
from sparseclt.training.several_ranks import check_supported, decided, device_of, processes

PATIENCE = timedelta(days=7)  # torchrun ends a process that waits for one that has died


def join(config: TrainConfig, language_model: LanguageModel | None = None) -> Ranks:
    """The grid of the processes that run `config` together. Of the two numbers of `config.parallel`, one that is given
    decides the other; without any they are those of `chosen`. `language_model`: if it is in memory already.

    Raises ValueError, naming the option, for a grid of another size and for what cannot be trained on several ranks.
    """
    world, grid = processes(), config.parallel
    latents, data = grid.latents, grid.data
    if world > 1 and latents is None and data is None:
        check_supported(config, 1)
        _begin(config)
        latents, data = _agreed(config, language_model)
    else:
        data = data or (world // latents if latents and world % latents == 0 else 1)
        latents = latents or max(1, world // data)
    if latents * data != world:
        raise ValueError(
            f"parallel.latents, parallel.data: expected numbers whose product is {world}, the processes that were "
            f"started, got {latents} and {data}; start them with torchrun --nproc-per-node "
            f"{latents * data} -m sparseclt"
        )
    if world == 1:
        return ONE_RANK
    check_supported(config, data)
    _begin(config)
    meshes = [_mesh(config, data, latents) for _ in range(2)]
    patient = Group.of(dist.new_group(backend="gloo", timeout=PATIENCE))
    return Ranks.of(meshes[0], Group.of(dist.group.WORLD), ahead=meshes[1], patient=patient)


def _mesh(config: TrainConfig, data: int, latents: int) -> DeviceMesh:
    """A mesh with groups of its own. Not by init_device_mesh, whose groups would have torch's own timeout."""
    places = torch.arange(data * latents).view(data, latents)
    rows, columns = (
        [dist.new_group(line.tolist(), timeout=config.parallel.timeout) for line in lines]
        for lines in (places, places.T)
    )
    own = [columns[dist.get_rank() % latents], rows[dist.get_rank() // latents]]
    return DeviceMesh.from_group(own, device_of(config.device).type, places, mesh_dim_names=("data", "latents"))


def _begin(config: TrainConfig) -> None:
    if dist.is_initialized():
        return
    device = device_of(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=config.parallel.timeout)


def _agreed(config: TrainConfig, language_model: LanguageModel | None) -> tuple[int, int]:
    """`chosen`, by the least memory that any rank has."""

    def shape() -> ModelShape:
        if language_model is not None:
            return replace(language_model.shape, parameters=0)  # its room is no longer free
        return memory.shape_of(config.model.path, config.model.layers)

    world = Group.of(dist.group.WORLD)
    found = decided(Ranks(world=world), shape)
    memories = world.objects(available_to_rank(device_of(config.device)))
    available = None if None in memories else min(memories)
    return chosen(config, found, world.size, available)


def chosen(config: TrainConfig, shape: ModelShape, world: int, available: int | None) -> tuple[int, int]:
    """(latents, data) for `world` processes: the fewest ranks to a CLT with which the plan of each fits into
    `available` bytes, and the rest for the data. All of them share the CLT where it fits on no fewer, where a batch
    cannot be shared, and where `available` is None."""
    for latents in range(1, world):
        data = world // latents
        shared = (world, config.clt.latents, shape.d_model)
        if available is None or any(total % latents for total in shared) or config.batch_rows % data:
            continue
        on_grid = replace(config, parallel=replace(config.parallel, latents=latents, data=data))
        if memory.make_plan(on_grid, shape).peak <= available:
            return latents, data
    return world, 1


def available_to_rank(device: torch.device) -> int | None:
    """Free memory for this process on its device: of a CPU, the share of one of the processes on this machine. None
    where it is unknown."""
    available = memory.available_bytes(device)
    if available is None or device.type != "cpu":
        return available
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def description(ranks: Ranks) -> str:
    """One line that says which grid was formed."""
    data, latents = ranks.data.size, ranks.latents.size
    return (
        f"{ranks.world.size} processes: {data} x {latents} ranks (--parallel.data {data}, --parallel.latents {latents})"
    )
