"""Rounding to bf16 by which small updates of weights are kept on average."""

import torch
from torch import Tensor


def round_stochastically(exact: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """bf16 `out` gets one of the two neighbours of each fp32 number of `exact`, so that its expectation is that number.
    `exact` is overwritten."""
    bits = exact.view(torch.int32)
    words = torch.empty(-(-exact.numel() // 2), dtype=torch.int32, device=exact.device)
    words.random_(-(2**31), 2**31, generator=generator)
    noise = words.view(torch.uint16)[: exact.numel()].view(exact.shape).to(torch.int32)
    rounded = bits.add_(noise).bitwise_and_(-65536).view(torch.float32)
    out.copy_(rounded)
