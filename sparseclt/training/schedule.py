"""The quantities of a run that depend on the step only."""

from sparseclt.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up to the peak, then constant, then a linear fall to zero at the end."""
    o, steps = config.optimizer, config.steps
    rise = (step + 1) / max(1.0, o.warmup_share * steps)
    fall = (steps - step) / max(1.0, o.decay_share * steps)
    return o.learning_rate * min(1.0, rise, fall)


def sparse_weight(config: TrainConfig, step: int) -> float:
    """rho, the weight of the sparsely-connected terms: 0 at first, then a linear rise to 1."""
    c, steps = config.loss, config.steps
    return min(1.0, max(0.0, step - c.sparse_start_share * steps) / max(1.0, c.sparse_ramp_share * steps))


def connections_may_change(config: TrainConfig, step: int) -> bool:
    """Whether the steps in vanilla mode only are over."""
    return step >= config.loss.sparse_start_share * config.steps
