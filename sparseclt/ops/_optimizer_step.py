"""What the optimiser's step on the CPU is given."""

from typing import NamedTuple

from torch import Tensor

from sparseclt.ops._torch_rows import Transpose


class Adam(NamedTuple):
    """One step: `step` counts from 1. The gradient counts times `gain`, and what Adam adds to the weights `scale`."""

    learning_rate: float
    betas: tuple[float, float]
    epsilon: float
    step: int
    gain: float = 1.0
    scale: float = 1.0


class Written(NamedTuple):
    """What the latents of a module wrote in a pass: values and ids [N, K], and the gradient of each target, [N, D].
    Modules that write the same target share its gradient."""

    values: Tensor
    indices: Tensor
    grads: tuple[Tensor, ...]


class Read(NamedTuple):
    """What one reader reads: dV [F, C], its connections by latent of the decoder, its encoder [F, D], and whether the
    mean of each of its rows is subtracted."""

    dV: Tensor
    by_upstream: Transpose
    W_enc: Tensor
    centred: bool
