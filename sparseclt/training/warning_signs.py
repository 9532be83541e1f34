"""Signs that a run goes wrong, said while it can still be stopped."""

import warnings
from collections import deque
from collections.abc import Mapping

from sparseclt.config import TrainConfig
from sparseclt.model.sites import MODE_NAMES, MODES, Mode
from sparseclt.training import schedule

SMOOTHED_STEPS = 20  # steps over which a metric is averaged before it is compared
FIRST_STEPS = 50  # say nothing yet
LOOK_BACK_SHARE = 0.1  # of the run's steps, over which a rise is measured
RISE = 1.5  # times its lowest value so far, from which an error counts as rising
MANY_DEAD, MORE_DEAD = 0.2, 0.02  # shares of latents: from which on to warn, and a rise that counts
NOISE = 0.01  # of an FVU: a smaller rise is none
ADVICE = "try a lower optimizer.learning_rate"


class TrainingWarning(UserWarning):
    """A run goes wrong: it does not stop by itself."""


class WarningSigns:
    """Watches the metrics of a run and warns, once for each sign:

    - a site's reconstruction is worse than its mean (FVU above 1) though the warm-up is long over;
    - the FVU of a mode, or the excess of sparsely-connected mode, is half as large again as it was;
    - more than a fifth of a mode's latents are dead, and clearly more than a tenth of the run ago.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self._smooth: dict[str, float] = {}
        self._lowest: dict[str, float] = {}
        self._before: dict[Mode, deque[float]] = {
            mode: deque(maxlen=max(1, round(LOOK_BACK_SHARE * config.steps))) for mode in MODES
        }
        self._said: set[str] = set()

    def look(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take in the metrics of `step`, which counts from 1, and warn of what is wrong with them."""
        long_enough = step > max(FIRST_STEPS, LOOK_BACK_SHARE * self.config.steps)
        ramped = long_enough and schedule.sparse_weight(self.config, step) == 1
        for mode in MODES:
            if f"fvu_{mode}" not in metrics:
                continue
            settled = long_enough if mode == "vanilla" else ramped
            self._look_at_dead(mode, step, metrics[f"dead_{mode}"], settled)
            self._look_for_rise(f"FVU in {MODE_NAMES[mode]}", step, metrics[f"fvu_{mode}"], settled)
            for name in metrics:
                if name.startswith(f"fvu_{mode}/"):
                    self._look_for_failure(name, mode, step, metrics[name], settled)
        if "fvu_sparse" in metrics:
            excess = metrics["fvu_sparse"] - metrics["fvu_vanilla"]
            self._look_for_rise(f"excess FVU of {MODE_NAMES['sparse']}", step, excess, ramped)

    def _smoothed(self, name: str, value: float) -> float:
        before = self._smooth.get(name, value)
        self._smooth[name] = before + (value - before) / SMOOTHED_STEPS
        return self._smooth[name]

    def _look_for_rise(self, name: str, step: int, value: float, settled: bool) -> None:
        now = self._smoothed(name, value)
        if not settled:
            return
        lowest = self._lowest[name] = min(now, self._lowest.get(name, now))
        if now > RISE * lowest and now > lowest + NOISE:
            self._say(name, f"step {step}: {name} has risen to {now:.3g} from {lowest:.3g}: {ADVICE}")

    def _look_for_failure(self, name: str, mode: Mode, step: int, value: float, settled: bool) -> None:
        now, site = self._smoothed(name, value), name.partition("/")[2]
        if settled and now > 1:
            reason = f"FVU {now:.3g}, worse than predicting the mean"
            self._say(name, f"step {step}: {site} is not reconstructed in {MODE_NAMES[mode]} ({reason}): {ADVICE}")

    def _look_at_dead(self, mode: Mode, step: int, value: float, settled: bool) -> None:
        past = self._before[mode]
        if settled and len(past) == past.maxlen and value > max(MANY_DEAD, past[0] + MORE_DEAD):
            dead = f"{value:.0%} of the latents are dead in {MODE_NAMES[mode]}"
            before = f"{past[0]:.0%} were {len(past)} steps before"
            self._say(f"dead_{mode}", f"step {step}: {dead}, {before}: {ADVICE}, or a higher optimizer.revival_rate")
        past.append(value)

    def _say(self, sign: str, message: str) -> None:
        if sign not in self._said:
            self._said.add(sign)
            warnings.warn(message, TrainingWarning, stacklevel=2)
