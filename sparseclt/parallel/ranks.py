"""The ranks of a training run: those that share a CLT's latents, and those that share a batch."""

from torch.distributed.device_mesh import DeviceMesh

from sparseclt.parallel.group import ALONE, Group


class Ranks:
    """Where this process stands in a grid of ranks: each row of the grid takes other rows of a batch (`data`), and the
    ranks of one row share the CLT (`latents`). `world`: all of them."""

    def __init__(self, latents: Group = ALONE, data: Group = ALONE, world: Group = ALONE):
        self.latents, self.data, self.world = latents, data, world

    @classmethod
    def of(cls, mesh: DeviceMesh, world: Group) -> "Ranks":
        """The ranks of a mesh with the dimensions "data" and "latents"."""
        return cls(Group.of(mesh.get_group("latents")), Group.of(mesh.get_group("data")), world)

    def __deepcopy__(self, memo: object) -> "Ranks":
        return self  # a copy of a CLT is on the same ranks

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all: that prints, logs, and makes directories."""
        return self.world.rank == 0


ONE_RANK = Ranks()
