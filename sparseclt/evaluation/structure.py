"""What the connections and decoders of a module look like."""

import torch
from torch import Tensor

from sparseclt.model.modules import Transcoder

VIRTUAL_WEIGHT_IN_EFFECT = 1e-4
SPLIT_COSINE = 0.9


def connection_structure(module: Transcoder, V: Tensor, live: Tensor) -> dict[str, float]:
    """`connections_in_effect` and `fan_out_top1pct` (see `metrics.Metrics`).

    `V` [F, C] or [H, F, C]: the module's virtual weights; `live` boolean [F]: latents that fire in
    sparsely-connected mode.
    """
    open_connections = module.open_connections()
    assert open_connections is not None and module.connection_indices is not None
    strength = V.abs() if V.dim() == 2 else V.abs().amax(0)
    live = live.to(V.device)
    used = open_connections & (strength > VIRTUAL_WEIGHT_IN_EFFECT)
    counts = used[live].sum(1)
    fan_out = torch.bincount(module.connection_indices[used & live[:, None]], minlength=module.upstream)
    hubs = fan_out.sort(descending=True).values[: max(1, module.upstream // 100)].sum()
    return {
        "connections_in_effect": counts.double().median().item() if len(counts) else 0.0,
        "fan_out_top1pct": (hubs / fan_out.sum().clamp_min(1)).item(),
    }


def splitting(decoders: Tensor, tile: int = 1024) -> float:
    """Share of latents whose nearest neighbour in the module has a decoder cosine above 0.9; `decoders` [F, T D].

    By tiles of rows and columns: F x F is never allocated.
    """
    unit = torch.nn.functional.normalize(decoders.detach(), dim=1)
    nearest = []
    for i, rows in enumerate(unit.split(tile)):
        best = rows.new_full((len(rows),), -1.0)
        for j, columns in enumerate(unit.split(tile)):
            cosine = rows @ columns.T
            if i == j:
                cosine.fill_diagonal_(-1.0)
            best = torch.maximum(best, cosine.amax(1))
        nearest.append(best)
    return (torch.cat(nearest) > SPLIT_COSINE).double().mean().item()
