import subprocess
import sys
from importlib import import_module

import pytest
import torch
from op_helpers import DEVICE, rows

from sparseclt import ops
from sparseclt.ops import backend

OPS = [name for name in ops.__all__ if name not in ("Connections", "backends", "pad_rows", "unpad_rows")]


def test_the_backends_are_listed():
    assert ops.backends() == ("reference", "torch", "triton", "numba")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_every_backend(op):
    module = import_module(f"sparseclt.ops.{op}")
    assert {"reference", *module.OPERATOR.backends} == set(ops.backends())
    assert getattr(module, f"{op}_reference")
    for name in {"torch", *backend.INSTALLED}:
        assert module.OPERATOR.implementation(name).forward


def test_the_automatic_choice_is_triton_on_cuda_where_it_takes_the_dtype_and_torch_elsewhere(monkeypatch):
    class Cuda:
        device, dtype = torch.device("cuda"), torch.bfloat16

    monkeypatch.setattr(backend, "INSTALLED", {"triton"})
    assert backend.choose("topk_encode", None, Cuda) == "triton"
    monkeypatch.setattr(Cuda, "dtype", torch.float64)
    assert backend.choose("topk_encode", None, Cuda) == "torch"
    assert backend.choose("topk_encode", None, torch.ones(1)) == "torch", "interpreted or not"
    monkeypatch.setattr(Cuda, "dtype", torch.float32)
    monkeypatch.setattr(backend, "INSTALLED", set())
    assert backend.choose("topk_encode", None, Cuda) == "torch"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_automatic_choice_on_the_cpu_is_numba_where_it_is_installed_and_takes_the_dtype(monkeypatch, dtype):
    takes = dtype in (torch.float32, torch.float64)
    monkeypatch.setattr(backend, "INSTALLED", {"numba", "triton"})
    assert backend.choose("topk_encode", None, torch.ones(1, dtype=dtype)) == ("numba" if takes else "torch")
    monkeypatch.setattr(backend, "INSTALLED", {"triton"})
    assert backend.choose("topk_encode", None, torch.ones(1, dtype=dtype)) == "torch"


def encode(name, dtype=torch.float32):
    return ops.topk_encode(rows(3, 4).to(dtype), rows(7, 4).to(dtype), None, 2, backend=name)


def test_an_unknown_backend_is_refused_with_the_list():
    with pytest.raises(
        ValueError,
        match=r"backend of topk_encode: expected one of 'reference', 'torch', 'triton', 'numba' or None.* got 'x'",
    ):
        encode("x")


def test_a_backend_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(backend, "INSTALLED", set())
    with pytest.raises(ImportError, match=r"backend='triton' needs triton: pip install 'sparseclt\[triton\]'"):
        encode("triton")
    with pytest.raises(ImportError, match=r"backend='numba' needs numba: pip install 'sparseclt\[cpu\]'"):
        encode("numba")


def test_numba_refuses_a_dtype_or_a_device_that_it_does_not_take(monkeypatch):
    monkeypatch.setattr(backend, "INSTALLED", {"numba"})
    with pytest.raises(TypeError, match=r"backend='numba': .*got torch.bfloat16; take backend='torch'"):
        encode("numba", torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"backend='numba': expected tensors on cpu, got meta, or take backend='torch'"
    ):
        backend.choose("topk_encode", "numba", torch.ones(1, device="meta"))


def test_triton_refuses_a_dtype_that_it_does_not_take(monkeypatch):
    monkeypatch.setattr(backend, "INSTALLED", {"triton"})
    monkeypatch.setattr(backend, "INTERPRETED", True)
    with pytest.raises(TypeError, match=r"backend='triton': .*got torch.float64; take backend='torch'"):
        encode("triton", torch.float64)


@pytest.mark.skipif(DEVICE != "cpu", reason="about tensors on the CPU")
def test_triton_on_the_cpu_says_how_to_turn_the_interpreter_on(monkeypatch):
    monkeypatch.setattr(backend, "INSTALLED", {"triton"})
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"expected tensors on cuda, got cpu.*set .*TRITON_INTERPRET=1 before Python"):
        encode("triton")


def test_import_needs_only_torch_is_quick_and_prints_nothing():
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


def test_the_first_call_imports_nothing_large():
    """torch.library.custom_op would import torch._dynamo: seconds."""
    code = """if True:
        import sys, torch
        from sparseclt.ops import topk_encode
        W = torch.randn(7, 4, requires_grad=True)
        topk_encode(torch.randn(3, 4), W, None, 2)[0].sum().backward()
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
