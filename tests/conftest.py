"""Without a GPU Triton's kernels run in its interpreter, which has to be chosen before triton is first imported.

Token ids are kept in the Hugging Face cache, which is an empty one here, for child processes too.
"""

import os
import shutil
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="sparseclt_tests_")


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
