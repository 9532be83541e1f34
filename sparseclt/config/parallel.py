"""How a run is spread over processes."""

from datetime import timedelta

from sparseclt.config.groups import Positive, Text
from sparseclt.config.strict import strict


@strict("parallel")
class ParallelConfig:
    """For experts: several GPUs, with one process each, which torchrun starts (docs/several-gpus.md)."""

    latents: Positive | None = None
    """Processes that share the CLT: each holds that fraction of every module. None: as few as it fits on."""
    data: Positive | None = None
    """Groups of such processes that share the rows of a batch. None: as many as there are processes for."""
    model_devices: tuple[Text, ...] = ()
    """Devices for the language model, in turn for the groups that share rows, such as cuda:7. (): that of each group's
    first process, the only one of them that loads the model."""
    timeout_seconds: Positive = 600
    """A process that has waited for another one for so long ends the run."""

    @property
    def timeout(self) -> timedelta:
        """`timeout_seconds` as torch takes it."""
        return timedelta(seconds=self.timeout_seconds)
