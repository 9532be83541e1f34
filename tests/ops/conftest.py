"""The same files run everywhere: on CUDA tensors where there is a GPU; elsewhere Triton's kernels are interpreted."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before sparseclt.ops and triton are imported

import pytest
from op_helpers import DEVICE


@pytest.fixture
def device() -> str:
    return DEVICE
