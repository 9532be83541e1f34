"""What an encoder's activation function makes of its strongest pre-activations.

In either mode a module's encoder yields candidates, at most `slots` for each token, by the kernels of TopK: the
strongest positive pre-activations, or, where latents have thresholds, those that are highest above their `floor`. TopK
keeps all of them, as it has K slots. BatchTopK and JumpReLU have more, and choose here. They are exact for tokens that
want no more latents than there are slots; `full_rows` counts those that may.
"""

import warnings

from torch import Tensor

from sparseclt.model.modules import Latents
from sparseclt.model.sites import Site
from sparseclt.ops.batchtopk_encode import among_largest
from sparseclt.ops.jumprelu_slots import floor, jump_relu_slots, raised
from sparseclt.parallel.collectives import gather_rows
from sparseclt.parallel.group import ALONE, Group

__all__ = ["above", "above_floor", "batch_top_k", "floor", "full_rows", "jump_relu", "warn_if_full"]


def batch_top_k(candidates: Latents, k: int, tokens: int, data: Group = ALONE) -> Latents:
    """BatchTopK (see `ops.batchtopk_encode`): the `tokens * k` largest positive candidates of all rows together, ties
    to the lowest row, then to the lowest latent. The other slots are empty: index -1 and value 0.

    `data`: the ranks that have the other rows, of which there are `tokens` in all. Each chooses among all candidates.
    """
    own = candidates.values.detach()
    kept = among_largest(gather_rows(own, data).flatten(), tokens * k).view(data.size, *own.shape)[data.rank]
    return _only(kept & (own != 0), candidates)


def above_floor(candidates: Latents, floor: Tensor) -> Latents:
    """Candidates found with biases less `floor` [F], with the pre-activations that they have without."""
    return Latents(raised(*candidates, floor), candidates.indices)


def above(candidates: Latents, threshold: Tensor) -> Latents:
    """The candidates above their latent's `threshold` [F], which has no gradient; the other slots are empty."""
    at = threshold.detach()[candidates.indices]
    return _only(~(candidates.values.detach() <= at), candidates)


def jump_relu(candidates: Latents, threshold: Tensor, bandwidth: float) -> tuple[Latents, Tensor]:
    """JumpReLU: the candidates above their latent's threshold [F], and the number of them l0 [N].

    Values and gradients are those of `ops.jumprelu_encode`, where they are explained; candidates near the threshold
    keep their slot, with value 0. `l0` is float32 or wider.
    """
    values, indices, l0 = jump_relu_slots(*candidates, threshold, bandwidth)
    return Latents(values, indices), l0


def full_rows(latents: Latents) -> Tensor:
    """How many tokens use all their slots, and may have wanted more: a scalar."""
    return (latents.values > 0).all(1).sum()


def warn_if_full(latents: Latents, active: int, site: Site) -> None:
    """A warning if a token uses all its slots, as latents that it wanted may have been left out."""
    if full := int(full_rows(latents)):
        slots = latents.values.shape[1]
        warnings.warn(
            f"{site.name}: {full} tokens have {slots} active latents, as many as they have room for with active = "
            f"{active}, and may lack others; a larger active gives them room",
            stacklevel=2,
        )


def _only(kept: Tensor, candidates: Latents) -> Latents:
    return Latents(candidates.values.masked_fill(~kept, 0), candidates.indices.masked_fill(~kept, -1))
