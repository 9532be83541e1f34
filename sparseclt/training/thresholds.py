"""The thresholds of BatchTopK and JumpReLU during training."""

from collections.abc import Mapping, Sequence

import torch

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
            threshold, kept = module.threshold_of(mode), values[values > 0]
            if len(kept):
                rate = RATE if threshold.any() else 1.0  # nothing to average with at first
                threshold.mul_(1 - rate).add_(kept.min(), alpha=rate)
    if "sparse" not in latents:
        for module in clt:
            module.threshold_of("sparse").copy_(module.threshold_of("vanilla"))


def metrics(clt: SparseCLT, latents: Mapping[Mode, Sequence[Latents]], counted: int) -> dict[str, float]:
    """Means over modules: active latents per token, of which so many count, and the share of tokens that use all their
    slots and may have wanted more latents than that."""
    found: dict[str, float] = {}
    for mode, of_modules in latents.items():
        tokens = len(of_modules) * counted
        found[f"l0_{mode}"] = sum(int((z.values > 0).sum()) for z in of_modules) / tokens
        if clt.architecture.slots < clt.architecture.latents:
            found[f"full_{mode}"] = sum(int(full_rows(z)) for z in of_modules) / tokens
    return found
