"""Figures of a CLT that is spread over ranks, for which rows and columns have to be gathered, and of text that is."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sparseclt.model.modules import Transcoder
from sparseclt.model.transcoders import Transcoders
from sparseclt.parallel import Group, to_rows
from sparseclt.parallel.collectives import gather_rows


@torch.no_grad()
def nearest_decoders_of_ranks(module: Transcoder, tile: int = 1024) -> tuple[Tensor, Tensor]:
    """`structure.nearest_decoders` of a module, [F] each, the same on all ranks.

    Each rank compares its share of the whole decoder rows with those of all ranks, `tile` of each at a time.
    """
    group, F = module.group, module.latents
    columns = module.W_dec.detach()
    rows = torch.stack([to_rows(columns[:, target], group) for target in range(columns.shape[1])], 1)
    unit = torch.nn.functional.normalize(rows.flatten(1), dim=1)
    each, first = len(unit), module.rows.start
    best = unit.new_full((each,), -1.0)
    index = torch.zeros(each, dtype=torch.int64, device=unit.device)
    own = torch.arange(first, first + each, device=unit.device)
    for start in range(0, each, tile):
        part = group.gather(unit[start : start + tile])  # [n, tile, T D]
        ids = (torch.arange(0, F, each)[:, None] + torch.arange(start, start + part.shape[1])).flatten().to(unit.device)
        for mine in torch.arange(each, device=unit.device).split(tile):
            cosine = unit[mine] @ part.flatten(0, 1).T
            cosine.masked_fill_(own[mine, None] == ids, -1.0)
            highest, place = cosine.max(1)
            nearer = highest > best[mine]
            best[mine] = torch.where(nearer, highest, best[mine])
            index[mine] = torch.where(nearer, ids[place], index[mine])
    return gather_rows(best, group), gather_rows(index, group)


def of_all_rows(module: Transcoder, tensor: Tensor, axis: int = 0) -> Tensor:
    """A tensor of which each rank has its rows along `axis`, with those of all ranks."""
    return gather_rows(tensor.movedim(axis, 0).contiguous(), module.group).movedim(0, axis)


def own_share(clt: Transcoders, rows: Tensor) -> Tensor:
    """Of text `rows` [R, S] those that this rank is to measure `clt` on: every one that shares the data has others."""
    data = clt.ranks.data
    return rows[data.rank :: data.size]


def add_up_(clt: Transcoders, sums: Iterable[Tensor]) -> None:
    """Sums over text, in place, with those of the other rows."""
    data, device = clt.ranks.data, clt.transcoder(0).W_dec.device
    for part in () if data.alone else sums:
        part.copy_(data.sum_(part.to(device)))


def added_up(data: Group, parts: dict[str, float]) -> dict[str, float]:
    """The same of numbers by name."""
    found = data.objects(parts)
    return {
        name: sum(one.get(name, 0.0) for one in found) for name in dict.fromkeys(key for one in found for key in one)
    }
