"""Tensors that several modules round: each is rounded once."""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class SharedRounding:
    """`tensor.to(dtype)`, one copy of each tensor for as long as that is alive; of another dtype than it has.

    All modules that write a site meet the same gradient [N, D] in their backward passes: copies of their own would be
    L times as many.
    """

    def __init__(self) -> None:
        self._copies = WeakTensorKeyDictionary()

    def __call__(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        if tensor not in self._copies:
            self._copies[tensor] = tensor.to(dtype)
        copy: Tensor = self._copies[tensor]
        return copy
