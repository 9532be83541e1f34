"""What the connections and decoders of a module look like."""

import torch
from torch import Tensor

from sparseclt.evaluation.over_ranks import nearest_decoders_of_ranks, of_all_rows
from sparseclt.model.modules import Transcoder

VIRTUAL_WEIGHT_IN_EFFECT = 1e-4
TWIN, NEAR = 0.9, 0.7  # cosine of two decoders


def connection_structure(module: Transcoder, V: Tensor, live: Tensor) -> dict[str, float]:
    """`connections_in_effect`, `connections_mean` and `fan_out_top1pct` (see `metrics.Metrics`).

    `V` [F, C] or [H, F, C]: the module's virtual weights, or this rank's rows of them; `live` boolean [F]: latents that
    fire in sparsely-connected mode.
    """
    open_connections = module.open_connections()
    assert open_connections is not None and module.all_connections is not None
    open_connections, V = of_all_rows(module, open_connections), of_all_rows(module, V, -2)
    strength = V.abs() if V.dim() == 2 else V.abs().amax(0)
    live = live.to(V.device)
    used = open_connections & (strength > VIRTUAL_WEIGHT_IN_EFFECT)
    counts = used[live].sum(1).double()
    fan_out = torch.bincount(module.all_connections.indices[used & live[:, None]], minlength=module.upstream)
    hubs = fan_out.sort(descending=True).values[: max(1, module.upstream // 100)].sum()
    return {
        "connections_in_effect": counts.median().item() if len(counts) else 0.0,
        "connections_mean": counts.mean().item() if len(counts) else 0.0,
        "fan_out_top1pct": (hubs / fan_out.sum().clamp_min(1)).item(),
    }


def nearest_of(module: Transcoder) -> tuple[Tensor, Tensor]:
    """`nearest_decoders` of a module, wherever its decoders are."""
    return nearest_decoders(module.W_dec.flatten(1)) if module.group.alone else nearest_decoders_of_ranks(module)


def nearest_decoders(decoders: Tensor, tile: int = 1024) -> tuple[Tensor, Tensor]:
    """The nearest neighbour of each latent in its module by decoders [F, T D]: their cosine [F], and its index [F].

    Equivalent to `(cosine - 2 * eye).max(1)` with the F x F cosines, which are computed by tiles of rows and columns.
    A module of one latent has no neighbour: cosine -1.
    """
    unit = torch.nn.functional.normalize(decoders.detach(), dim=1)
    nearest = [_nearest(rows, unit, i * tile, tile) for i, rows in enumerate(unit.split(tile))]
    cosine, index = (torch.cat(parts) for parts in zip(*nearest, strict=True))
    return cosine, index


def _nearest(rows: Tensor, unit: Tensor, first: int, tile: int) -> tuple[Tensor, Tensor]:
    """Of `rows` of `unit` [F, T D], the first of which is number `first`."""
    best = rows.new_full((len(rows),), -1.0)
    index = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
    for j, columns in enumerate(unit.split(tile)):
        cosine = rows @ columns.T
        if j * tile == first:
            cosine.fill_diagonal_(-1.0)
        highest, place = cosine.max(1)
        nearer = highest > best
        best, index = torch.where(nearer, highest, best), torch.where(nearer, place + j * tile, index)
    return best, index
