"""Language models in dtypes other than float32, and how far rounding may carry them from a formula."""

from typing import Any

import torch
from torch import Tensor

# Of the largest entry: far above rounding, far below a wrong formula. In half precision the residual stream is rounded
# at each of its additions.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 6e-2}


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Whether a and b, from a model in `dtype`, are the same up to rounding."""
    return bool((a - b).abs().max() <= TOLERANCE[dtype] * b.abs().max())


def keep_dtype(bridge: Any, dtype: torch.dtype) -> None:
    """Let a `TransformerBridge` whose weights are in `dtype` compute in it."""
    if dtype == torch.float64:
        _keep_float64(bridge)
    elif dtype != torch.float32:
        _keep_half(bridge, dtype)


def _keep_half(bridge: Any, dtype: torch.dtype) -> None:
    """Round rotated queries and keys back to `dtype`, as OLMo-2 does, whose angles are float32; its bridge leaves that
    out, and then fails on mixed dtypes."""

    def round_back(value: Tensor, hook: Any) -> Tensor | None:
        return None if value.dtype == dtype else value.to(dtype)

    for block in bridge.blocks:
        for name in ("hook_rot_q", "hook_rot_k"):
            if hasattr(block.attn, name):
                getattr(block.attn, name).add_perma_hook(round_back)


def _keep_float64(bridge: Any) -> None:
    """Hugging Face computes RMSNorm and softmax in float32 whatever the dtype: undo what that costs."""

    def rows_sum_to_one(pattern: Tensor, hook: Any) -> Tensor | None:
        exact = pattern / pattern.sum(-1, keepdim=True)
        return exact if close(exact, pattern, torch.float64) else None  # rows that sum to less (attention sinks) stay

    for module in bridge.modules():
        if hasattr(module, "use_native_layernorm_autograd"):
            module.use_native_layernorm_autograd = False
    for block in bridge.blocks:
        block.attn.hook_pattern.add_perma_hook(rows_sum_to_one)
