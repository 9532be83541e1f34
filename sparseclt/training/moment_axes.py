"""How the optimiser's state is spread over ranks that share a CLT."""

from sparseclt.storage.parts import Axis

MOMENTS = ("mean", "square")


def moment_axis(name: str) -> Axis | None:
    """What a rank has of one of `RowAdam.tensors()`."""
    parameter, key = name.rsplit(".", 1)[-1].split("/")
    if parameter == "b_dec" or key == "scale":
        return None
    if parameter == "W_dec":
        return "columns" if key in MOMENTS else None
    return "rows"
