"""The same bits on every run, and for every token whatever its neighbours; weight gradients to reassociation."""

import pytest
import torch
from op_helpers import BACKENDS, DEVICE

from sparseclt import ops
from sparseclt.ops import selftest

SIZES = {"N": 17, "D": 24, "F": 90, "K": 5, "C": 4, "U": 40, "S": 6}
CASES = {case.name: case for case in selftest.cases(**SIZES)}
BY_TOKEN = ("x", "r0", "z_values", "z_indices", "scale", "values", "indices")
# In attention, the order of tokens has a meaning.
OF_TOKENS = [n for n, c in CASES.items() if c.inputs.keys() & set(BY_TOKEN) and c.op != "attention_encode"]
OUTPUTS = ("out0", "out1", "out2")


def run(case, backend, order=None, dtype=torch.float32):
    """Outputs and gradients, tokens in another order on the way."""
    inputs = selftest.cast(case.inputs, dtype, DEVICE)
    given = dict(inputs)
    if order is not None:
        given |= {name: inputs[name][order] for name in BY_TOKEN if name in inputs}
    result = getattr(ops, case.op)(**given, backend=backend)
    results = list(result) if isinstance(result, tuple) else [result]
    if order is not None:
        results = [out[order.argsort()] for out in results]
    found = {f"out{i}": out.detach() for i, out in enumerate(results)}
    outputs = [out for out in results if out.requires_grad]
    return found | (selftest.gradients(outputs, inputs) if outputs else {})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_three_runs_agree_to_the_last_bit(backend, dtype, name):
    if not selftest.runnable(backend, dtype, DEVICE):
        pytest.skip(f"{backend} does not take {dtype}")
    once, *again = (run(CASES[name], backend, dtype=dtype) for _ in range(3))
    for other in again:
        assert all(torch.equal(once[quantity], other[quantity]) for quantity in once)


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_tokens_changes_nothing(backend, name):
    """Outputs and gradients of tokens are equal. Those of weights are sums over tokens: equal but for their order.

    In Triton's interpreter a product is NumPy's, which rounds a row by its place in the tile: near, not equal.
    """
    interpreted = backend == "triton" and DEVICE == "cpu"
    case, order = CASES[name], torch.randperm(SIZES["N"], generator=torch.Generator().manual_seed(0)).to(DEVICE)
    straight, permuted = run(case, backend), run(case, backend, order)
    for quantity, expected in straight.items():
        if quantity in (*BY_TOKEN, *OUTPUTS) and not interpreted:
            assert torch.equal(permuted[quantity], expected), quantity
        else:
            torch.testing.assert_close(permuted[quantity], expected, rtol=1e-5, atol=1e-6)
