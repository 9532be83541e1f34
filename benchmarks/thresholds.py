"""Targets for our ops and steps on the CPU, as medians of interleaved ratios in one run. The report shows the measured
ratio beside each; no test fails because of a time."""

from dataclasses import asdict, dataclass
from typing import Any

from shapes import OPS, STEPS

_DECODE, _ENCODE = (OPS["full"][op][0] for op in ("sparse_decode", "topk_encode"))
_VIRTUAL, _SELECT = (OPS["full"][op][0] for op in ("virtual_weights+virtual_matmul", "select_connections"))


@dataclass(frozen=True)
class Threshold:
    """`against` takes at least `times` the time of ours, and `memory` times its transient memory. `at_most`: ours
    takes at most that many times the time of `against`. `backends`: the ones that count; (): the fastest one."""

    work: str
    case: str
    direction: str
    shapes: dict[str, int]
    against: str
    times: float | None = None
    memory: float | None = None
    at_most: float | None = None
    backends: tuple[str, ...] = ()


_VANILLA, _BOTH = "training step, vanilla mode", "training step, both modes"
_PAIR = "virtual_weights+virtual_matmul"
THRESHOLDS = [
    Threshold("`sparse_decode` forward", "sparse_decode", "forward", _DECODE, "dense", 40),
    Threshold("`sparse_decode` backward", "sparse_decode", "backward", _DECODE, "dense", 30),
    Threshold("`topk_encode` forward", "topk_encode", "forward", _ENCODE, "gemm+topk", 1.4, 20),
    Threshold("`topk_encode` backward", "topk_encode", "backward", _ENCODE, "gemm+topk", 25),
    Threshold(f"`{_PAIR}` forward", _PAIR, "forward", _VIRTUAL, "dense", 50, backends=("numba",)),
    Threshold(f"`{_PAIR}` backward", _PAIR, "backward", _VIRTUAL, "dense", 80, backends=("numba",)),
    Threshold(f"`{_PAIR}` forward", _PAIR, "forward", _VIRTUAL, "dense", 4, backends=("torch",)),
    Threshold(f"`{_PAIR}` backward", _PAIR, "backward", _VIRTUAL, "dense", 10, backends=("torch",)),
    Threshold("`select_connections`", "select_connections", "forward", _SELECT, "dense", 1.5, 30),
    Threshold("vanilla training step", _VANILLA, "step", STEPS["full"]["vanilla"], "dense", 10, 8),
    Threshold("vanilla training step", _VANILLA, "step", STEPS["full"]["vanilla"], "dense", 10,
              backends=("numba, train_step",)),
    Threshold("training step in both modes", _BOTH, "step", STEPS["full"]["both"], "dense", 20, 15,
              backends=("numba, train_step",)),
    Threshold(
        "vanilla training step over its floor", _VANILLA, "step", STEPS["full"]["vanilla"], "floor: encode GEMMs",
        at_most=2.2, backends=("numba, train_step",),
    ),
]  # fmt: skip


def as_json() -> list[dict[str, Any]]:
    return [asdict(threshold) for threshold in THRESHOLDS]
