"""Where the modules of a CLT sit in the model, and which modules come before which."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["attn", "mlp"]
Mode = Literal["vanilla", "sparse"]
MODES: tuple[Mode, Mode] = ("vanilla", "sparse")
MODE_NAMES: dict[Mode, str] = {"vanilla": "vanilla mode", "sparse": "sparsely-connected mode"}
Open = Literal["own", "all", "none"]  # the connections that are open in sparsely-connected mode


@dataclass(frozen=True)
class Site:
    """A place in the model whose output one module reconstructs: the MLP or the attention of a layer."""

    kind: Kind
    layer: int

    @property
    def name(self) -> str:
        return f"{self.kind}_{self.layer}"


def model_sites(layers: int, attention: bool) -> tuple[Site, ...]:
    """Every site in the model's own order: attn_0, mlp_0, attn_1, ... or, without attention, mlp_0, mlp_1, ..."""
    kinds: tuple[Kind, ...] = ("attn", "mlp") if attention else ("mlp",)
    return tuple(Site(kind, layer) for layer in range(layers) for kind in kinds)


def is_earlier(writer: Site, reader: Site, parallel: bool) -> bool:
    """Whether what `writer` writes is in the residual stream that `reader` reads.

    Sequential blocks: lower layers, and the same layer's attention for an MLP. Parallel blocks (attention and
    MLP of a layer read the same residual stream): strictly lower layers only.
    """
    if writer.layer != reader.layer:
        return writer.layer < reader.layer
    return not parallel and writer.kind == "attn" and reader.kind == "mlp"


def upstream_modules(sites: Sequence[Site], index: int, parallel: bool) -> int:
    """How many modules come before module `index`: always the first ones of the model's order."""
    return sum(is_earlier(site, sites[index], parallel) for site in sites)
