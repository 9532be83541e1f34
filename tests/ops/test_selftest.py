"""The self-test passes here, and sees what it is there to see."""

import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from sparseclt import cli
from sparseclt.ops import backend, selftest
from sparseclt.ops.registration import Implementation

OPS = [case.op for case in selftest.cases()]
OPERATORS = {op: import_module(f"sparseclt.ops.{op}").OPERATOR for op in OPS}


def test_the_command_prints_a_line_for_each_op_and_dtype_and_says_pass(capsys):
    assert cli.main(["selftest", "--device", "cpu", "--backends", "torch"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")][2:]
    assert len(lines) == len(OPS) * 4 and all("| pass |" in line for line in lines)
    assert printed.rstrip().endswith("44 passed, 0 failed")


def test_an_unknown_backend_is_named(capsys):
    assert cli.main(["selftest", "--backends", "cuda"]) == 2
    assert "got 'cuda'" in capsys.readouterr().err


def off_by_little(result):
    """The first result, its last number 0.1 % too large."""
    first, *rest = result if isinstance(result, tuple) else (result,)
    if first is not None and first.is_floating_point() and first.numel():
        first = first.clone()
        first.view(-1)[first.abs().argmax()] *= 1.001
    return (first, *rest) if isinstance(result, tuple) else first


@pytest.fixture
def broken(monkeypatch):
    """The torch backend, by another name, with one pass of one op made wrong by a wrapper."""
    monkeypatch.setattr(backend, "BACKENDS", (*backend.BACKENDS, "broken"))
    for operator in OPERATORS.values():
        monkeypatch.setitem(operator._loaded, "broken", operator.implementation("torch"))

    def break_(op, which, wrapper):
        right = OPERATORS[op].implementation("torch")
        wrong = getattr(right, which)
        broken = replace(right, **{which: lambda *args: wrapper(wrong(*args))})
        monkeypatch.setitem(OPERATORS[op]._loaded, "broken", broken)

    return break_


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize(
    "op",
    ["topk_encode", "sparse_decode", "virtual_weights", "virtual_matmul", "connected_encode", "attention_encode"],
)
def test_one_number_slightly_wrong_fails(broken, op, which):
    broken(op, which, off_by_little)
    rows = selftest.selftest("cpu", ["broken"], [torch.float32])
    assert {row.name.split()[0] for row in rows if not row.passed} == {op}


def test_a_missing_relu_mask_fails(broken, monkeypatch):
    """The fault of a well-known fused encoder."""
    operator = OPERATORS["topk_encode"]
    right = operator.implementation("torch")

    def unmasked(grad, values, indices, *rest):
        return right.backward(grad, torch.ones_like(values), indices, *rest)

    monkeypatch.setitem(operator._loaded, "broken", Implementation(right.forward, unmasked))
    assert not selftest.check(selftest.cases()[0], torch.float32, "broken").passed


def test_the_commands_exit_status_says_fail(broken, capsys):
    broken("sparse_decode", "backward", off_by_little)
    assert cli.main(["selftest", "--device", "cpu", "--backends", "broken"]) == 1
    printed = capsys.readouterr().out
    assert "(allowed" in printed and "| FAIL |" in printed


@pytest.mark.parametrize("op", ["batchtopk_encode", "jumprelu_encode", "select_connections"])
def test_a_selection_that_misses_something_fails(broken, op):
    def second_best(result):
        if op == "select_connections":
            return result.roll(1, 1)
        values, indices, *rest = result
        values[0, 0], indices[0, 0] = 0, -1
        return (values, indices, *rest)

    broken(op, "forward", second_best)
    failed = [row.name for row in selftest.selftest("cpu", ["broken"], [torch.float32]) if not row.passed]
    assert failed == [op]


def test_it_needs_only_torch():
    code = """if True:
        import sys, torch
        before = set(sys.modules)
        from sparseclt.ops import selftest
        assert selftest.main("cpu", ["torch"]) == 0
        assert not {"numba", "numpy", "triton", "tyro"} & (set(sys.modules) - before)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout.rstrip().endswith("44 passed, 0 failed"), result.stderr
