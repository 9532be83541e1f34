"""Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is first imported."""

import os
import sys

import torch

if not torch.cuda.is_available():
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("triton was imported before TRITON_INTERPRET=1 was set: set it when pytest starts")
    os.environ["TRITON_INTERPRET"] = "1"
