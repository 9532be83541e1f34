"""The shapes that are measured: a tiny set, to test the suite, a quick one (under three minutes), and the full one."""

from baseline_costs import Mode
from measure import Effort

EFFORT = {"tiny": Effort(0.0, 2, 2, 0.0), "quick": Effort(1.25, 3, 15), "full": Effort(20.0, 5, 25)}

_tiny = {"N": 24, "D": 16, "F": 64, "K": 4}
_decode = {"N": 1024, "D": 512, "F": 16384, "K": 32}
_encode = {"N": 1024, "D": 512, "F": 32768, "K": 32}
_pair = {"N": 1024, "D": 256, "F": 8192, "C": 32, "U": 8192, "S": 32}
_small_pair = {"N": 512, "D": 256, "F": 2048, "C": 32, "U": 4096, "S": 64}
_quick_pair = _small_pair | {"F": 1024, "U": 2048}
_select = {"D": 256, "F": 4096, "C": 32, "U": 32768}


def _of(sizes: dict[str, int], letters: str, **others: int) -> dict[str, int]:
    return {letter: (sizes | others)[letter] for letter in letters}


_tiny_pair = {"N": 24, "D": 16, "F": 64, "C": 5, "U": 128, "S": 6}
OPS: dict[str, dict[str, list[dict[str, int]]]] = {
    "tiny": {
        "sparse_decode": [_tiny],
        "topk_encode": [_tiny],
        "batchtopk_encode": [_tiny],
        "jumprelu_encode": [_tiny],
        "virtual_weights": [_of(_tiny_pair, "DFCU")],
        "virtual_matmul": [_of(_tiny_pair, "NFCUS")],
        "virtual_weights+virtual_matmul": [_tiny_pair],
        "connected_encode": [_tiny_pair | {"K": 4}],
        "select_connections": [_of(_tiny_pair, "DFCU")],
    },
    "quick": {
        "sparse_decode": [_decode],
        "topk_encode": [_encode | {"N": 512, "F": 8192}],
        "batchtopk_encode": [_encode | {"N": 256, "F": 4096}],
        "jumprelu_encode": [_encode | {"N": 256, "F": 4096}],
        "virtual_weights": [_of(_quick_pair, "DFCU")],
        "virtual_matmul": [_of(_quick_pair, "NFCUS")],
        "virtual_weights+virtual_matmul": [_quick_pair],
        "connected_encode": [_quick_pair | {"K": 32}],
        "select_connections": [_select | {"F": 512}],
    },
    "full": {
        "sparse_decode": [_decode, _decode | {"K": 128}, {"N": 256, "D": 256, "F": 1024, "K": 32}],
        "topk_encode": [_encode, _encode | {"F": 8192}, _encode | {"K": 128}],
        "batchtopk_encode": [_encode | {"F": 8192}],
        "jumprelu_encode": [_encode | {"F": 8192}],
        "virtual_weights": [_of(_pair, "DFCU")],
        "virtual_matmul": [_of(_pair, "NFCUS")],
        "virtual_weights+virtual_matmul": [_pair, _small_pair, _small_pair | {"F": 512, "U": 512, "S": 32}],
        "connected_encode": [_pair | {"K": 32}],
        "select_connections": [_select],
    },
}
# Tokens are rows of 128, or fewer.
_step = {"L": 4, "D": 256, "F": 4096, "K": 32, "C": 32, "N": 1024}
_tiny_step = {"L": 3, "D": 16, "F": 64, "K": 4, "C": 5, "N": 24}
_quick_step = {"L": 4, "D": 128, "F": 1024, "K": 32, "C": 32, "N": 512}
STEPS: dict[str, dict[Mode, dict[str, int]]] = {
    "tiny": {"vanilla": _tiny_step, "both": _tiny_step},
    "quick": {"vanilla": _quick_step, "both": _quick_step},
    "full": {"vanilla": _step | {"L": 12, "F": 8192}, "both": _step},
}
# One letter at a time leaves the base.
SCALING: dict[str, tuple[dict[str, int], dict[str, list[int]]]] = {
    "tiny": ({"L": 2, "D": 16, "F": 64, "K": 4, "C": 4, "N": 24}, {"F": [64, 96]}),
    "quick": (
        {"L": 3, "D": 64, "F": 1024, "K": 16, "C": 16, "N": 256},
        {"N": [64, 256, 512], "F": [256, 1024, 2048], "K": [4, 16, 64], "C": [4, 16, 64], "L": [2, 3, 4]},
    ),
    "full": (
        {"L": 4, "D": 128, "F": 2048, "K": 32, "C": 32, "N": 512},
        {
            "N": [32, 128, 512, 2048],
            "F": [256, 512, 1024, 2048, 4096, 8192],
            "K": [4, 16, 32, 128, 512],
            "C": [4, 16, 32, 128, 512],
            "L": [2, 4, 8, 12],
        },
    ),
}
# Beyond so many flops of one dense step, only ours is measured.
DENSE_FLOPS = {"tiny": 1e12, "quick": 1.2e11, "full": 1.5e12}
