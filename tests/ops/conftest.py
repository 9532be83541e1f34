"""The same files run everywhere: on CUDA tensors where there is a GPU."""

import pytest
from op_helpers import DEVICE


@pytest.fixture
def device() -> str:
    return DEVICE
