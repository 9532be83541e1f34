"""The thresholds of BatchTopK and JumpReLU during training."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseclt.model.activations import Activations
from sparseclt.model.clt import SparseCLT
from sparseclt.model.modules import Latents
from sparseclt.model.nonlinearity import full_rows
from sparseclt.model.over_ranks import counted_by_all
from sparseclt.model.sites import Mode
from sparseclt.parallel.collectives import gather_rows

RATE = 0.1  # of the running mean of BatchTopK's thresholds: a mean over some ten batches


@torch.no_grad()
def calibrate(clt: SparseCLT, activations: Activations, backend: str | None = None) -> None:
    """JumpReLU's first thresholds: those with which each module has K active latents per token, on average over the
    batch and in vanilla mode. They start at zero, as those of a plain ReLU."""
    if clt.architecture.activation != "jumprelu":
        return
    data = clt.ranks.data
    tokens = counted_by_all(activations, data)
    for module, latents in zip(clt, clt(activations, "vanilla", backend=backend).latents, strict=True):
        found = gather_rows(latents.values, data).flatten()
        module.threshold_of("vanilla").fill_(
            found.topk(tokens * clt.architecture.active_of(module.site.layer)).values[-1]
        )


@torch.no_grad()
def follow(clt: SparseCLT, latents: Mapping[Mode, Sequence[Latents]]) -> None:
    """After a step. BatchTopK: take the smallest value that each mode's batch kept into its running mean, which stands
    for the batch outside training (Bussmann, Leask, Nanda, "BatchTopK Sparse Autoencoders", 2024); until
    sparsely-connected mode is trained, it has the threshold of vanilla mode. JumpReLU: thresholds stay above zero."""
    if clt.architecture.activation == "jumprelu":
        for module in clt:
            module.threshold_of("vanilla").clamp_min_(0)
    if clt.architecture.activation != "batchtopk":
        return
    for mode, of_modules in latents.items():
        for module, (values, _) in zip(clt, of_modules, strict=True):
            threshold = module.threshold_of(mode)
            least = values.where(values > 0, math.inf).min().to(threshold.dtype)
            mean = (threshold * (1 - RATE)).add_(least, alpha=RATE)
            followed = torch.where(threshold.any(), mean, least)  # nothing to average with at first
            threshold.copy_(torch.where(least.isinf(), threshold, followed))
    if "sparse" not in latents:
        for module in clt:
            module.threshold_of("sparse").copy_(module.threshold_of("vanilla"))


def metrics(clt: SparseCLT, latents: Mapping[Mode, Sequence[Latents]], counted: int) -> dict[str, Tensor]:
    """Means over modules: active latents per token, of which so many count, and the share of tokens that use all their
    slots and may have wanted more latents than that. On the device, in float64."""
    found: dict[str, Tensor] = {}
    for mode, of_modules in latents.items():
        tokens = len(of_modules) * counted
        found[f"l0_{mode}"] = torch.stack([(z.values > 0).sum() for z in of_modules]).sum().double() / tokens
        if clt.architecture.slots < clt.architecture.latents:
            found[f"full_{mode}"] = torch.stack([full_rows(z) for z in of_modules]).sum().double() / tokens
    return found
