import subprocess
import sys

import pytest

from sparseclt import ops
from sparseclt.ops import backend

OPS = [name for name in ops.__all__ if name not in ("Connections", "backends")]


def test_the_backends_are_listed():
    assert ops.backends() == ("reference", "torch")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_every_backend_and_torch_is_the_automatic_choice(op):
    for name in ops.backends():
        backend.lookup(op, name)
    assert backend.lookup(op, None) is backend.lookup(op, "torch")


def test_an_unknown_backend_is_refused_with_the_list():
    with pytest.raises(
        ValueError, match=r"backend of topk_encode: expected one of 'reference', 'torch'.* got 'triton'"
    ):
        backend.lookup("topk_encode", "triton")


def test_import_needs_torch_alone_is_quick_and_prints_nothing():
    code = """if True:
        import sys, time, torch
        before, start = set(sys.modules), time.process_time()
        import sparseclt.ops
        took = time.process_time() - start  # not the wall clock: other processes may keep us waiting
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        extra = new - {"sparseclt"} - set(sys.stdlib_module_names)
        assert not extra, extra
        assert took < 0.3, took
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
