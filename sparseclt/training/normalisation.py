"""The units of every site, so that a CLT learns the same whatever units its model has.

Training is exactly that of a CLT whose inputs x / s_in and targets y / s_out are normalised. Its encoders would be
W_enc s_in, its decoders W_dec / s_out and b_dec / s_out. Instead of such weights, which would have to be converted
wherever they are read, the weights keep the model's own units, and the optimiser takes its steps in the others: of a
parameter that is `scale` times the normalised one, it is given `gradient * scale`, and its step is multiplied by
`scale` (see `RowAdam`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparseclt.model.activations import Activations
from sparseclt.model.sites import Site
from sparseclt.model.transcoders import Transcoders
from sparseclt.parallel import ALONE, Group
from sparseclt.training.losses import mean_over
from sparseclt.training.optimizer import RowAdam


class SiteScales(NamedTuple):
    """Of every module's site, [M] each, float64: the root mean square over tokens and D of what its encoder reads in
    vanilla mode, and that of its output around the output's mean over tokens."""

    inputs: Tensor
    outputs: Tensor


def site_scales(clt: Transcoders, activations: Activations) -> SiteScales:
    """The scales on one batch, over the tokens that count; 1 for a site that is zero, or constant, on all of them."""
    counted, data = activations.counted_flat, clt.ranks.data
    inputs = [root_mean_square(activations.input(site), counted, data=data) for site in clt.sites]
    outputs = [root_mean_square(activations.output(site), counted, True, data) for site in clt.sites]
    return SiteScales(torch.stack(inputs), torch.stack(outputs))


def root_mean_square(y: Tensor, counted: Tensor | None, around_mean: bool = False, data: Group = ALONE) -> Tensor:
    """Of y [N, D] over the tokens that count; equivalent to `y.square().mean().sqrt()`, or, around the mean, to
    `(y - y.mean(0)).square().mean().sqrt()`. Scalar, float64. `data`: the ranks that have the other tokens."""
    y = (y if counted is None else y[counted]).double()
    if around_mean:
        y = y - mean_over(y, None, data)
    square = y.square().mean(1)
    size = mean_over(square[:, None], None, data)[0].sqrt()
    return size.where(size > 0, 1.0)


@torch.no_grad()
def normalise(clt: Transcoders, optimizer: RowAdam, activations: Activations, untrained: bool = True) -> None:
    """At the start of a run: measure the scales on its first batch, give them to `optimizer`, whose state they are part
    of, and let untrained encoders be as large for these inputs as they were for inputs of size 1."""
    scales = site_scales(clt, activations)
    outputs = dict(zip(clt.sites, scales.outputs, strict=True))
    for i, module in enumerate(clt):
        site, parameter = module.site, f"transcoders.{i}."
        encoder = optimizer.scales[parameter + "W_enc"]
        if untrained:
            module.W_enc.mul_(1 / scales.inputs[i] / encoder)
        encoder.copy_(1 / scales.inputs[i])
        targets = [outputs[Site(site.kind, site.layer + target)] for target in range(module.W_dec.shape[1])]
        optimizer.scales[parameter + "W_dec"].copy_(torch.stack(targets)[:, None])
        optimizer.scales[parameter + "b_dec"].copy_(outputs[site])
