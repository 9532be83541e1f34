"""The ranks of a training run: those that share a CLT's latents, and those that share a batch."""

from torch.distributed.device_mesh import DeviceMesh

from sparseclt.parallel.group import ALONE, Group


class Ranks:
    """Where this process stands in a grid of ranks: each row of the grid takes other rows of a batch (`data`), and the
    ranks of one row share the CLT (`latents`). `world`: all of them.

    `ahead`: the same ranks, to be spoken to from the thread that prepares the next batch, whose messages must not come
    between those of a step. `patient`: all of them, to wait for what may take hours."""

    def __init__(
        self,
        latents: Group = ALONE,
        data: Group = ALONE,
        world: Group = ALONE,
        ahead: "Ranks | None" = None,
        patient: Group | None = None,
    ):
        self.latents, self.data, self.world = latents, data, world
        self.ahead, self.patient = ahead or self, patient or world

    @classmethod
    def of(cls, mesh: DeviceMesh, world: Group, ahead: DeviceMesh, patient: Group) -> "Ranks":
        """The ranks of a mesh with the dimensions "data" and "latents", and of the same mesh with other groups."""
        of_step, of_next = ([Group.of(m.get_group(name)) for name in ("latents", "data")] for m in (mesh, ahead))
        return cls(of_step[0], of_step[1], world, Ranks(of_next[0], of_next[1]), patient)

    def __deepcopy__(self, memo: object) -> "Ranks":
        return self  # a copy of a CLT is on the same ranks

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all: that prints, logs, and makes directories."""
        return self.world.rank == 0


ONE_RANK = Ranks()
