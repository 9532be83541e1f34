"""Adam in one pass over weights and moments, by the functions of the numba backend."""

from collections.abc import Mapping

from torch import Tensor

from sparseclt.ops.optimizer_step import Adam, adam_, in_one_pass


def fits(weights: Tensor, moments: Mapping[str, Tensor], backend: str | None) -> bool:
    """Whether the functions take a parameter: with moments as wide as it is, of which all rows are updated."""
    plain = moments["mean"].dtype == weights.dtype and "last" not in moments
    return plain and in_one_pass(weights, backend)


def numbers(
    scales: Tensor | None,
    factor: float,
    learning_rate: float,
    betas: tuple[float, float],
    epsilon: float,
    step: int,
) -> list[Adam]:
    """Adam's numbers for a parameter, or for each target of a decoder, whose gradient counts times `factor`."""
    plain = Adam(learning_rate, betas, epsilon, step)
    of_each = [1.0] if scales is None else scales.flatten().numpy().tolist()
    return [plain._replace(gain=scale * factor, scale=scale) for scale in of_each]


def step(weights: Tensor, gradient: Tensor, moments: Mapping[str, Tensor], numbers: Adam, rests: bool) -> None:
    """One step in place. `rests`: rows without a gradient stay where they are."""
    adam_(weights, gradient.contiguous(), moments["mean"], moments["square"], numbers, rests)
