"""Gradients of the fp32 backends against central differences of their own outputs.

Every op is linear in each input while the selected latents stay the same, so that the difference over a step is exact
up to fp32 rounding. (float64 backends: gradcheck, in each op's own tests.)
"""

import pytest
import torch
from op_helpers import COMPILED, DEVICE

from sparseclt import ops
from sparseclt.ops import selftest

SIZES = {"N": 4, "D": 6, "F": 20, "K": 3, "C": 3, "U": 12, "S": 3}
CASES = {case.name: case for case in selftest.cases(**SIZES)}
STEP = 1e-3
NO_GRADIENT = ("select_connections",)
CONSTANT = {"scale", "mix", "threshold"}  # no gradient; a straight-through one, which is no derivative of the output


@pytest.mark.parametrize("backend", ["torch", *COMPILED])
@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_GRADIENT])
def test_each_gradient_is_the_difference_over_a_small_step(name, backend):
    case = CASES[name]
    bias = {"b_enc": case.inputs["b_enc"] + 2.0} if "b_enc" in case.inputs else {}  # enough positive ones at this size
    inputs = selftest.cast(case.inputs | bias, torch.float32, DEVICE)

    def run(changed):
        result = getattr(ops, case.op)(**inputs | changed, backend=backend)
        return result if isinstance(result, tuple) else (result, None)

    values, selected = run({})[:2]
    weights = torch.linspace(0.5, 1.5, values.numel(), device=DEVICE).view(values.shape)
    names = [n for n, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad and n not in CONSTANT]
    assert names
    gradients = torch.autograd.grad((values * weights).sum(), [inputs[n] for n in names])
    for n, gradient in zip(names, gradients, strict=True):
        assert gradient.any(), n
        direction = torch.cos(torch.arange(gradient.numel(), device=DEVICE).float()).view(gradient.shape)
        steps = [run({n: inputs[n].detach() + sign * STEP * direction})[:2] for sign in (1, -1)]
        if selected is not None:
            assert all(torch.equal(ids[v > 0], selected[values > 0]) for v, ids in steps), "take another seed"
        difference = sum(s * (v.double() * weights).sum() for s, (v, _) in zip((1, -1), steps, strict=True)) / (
            2 * STEP
        )
        torch.testing.assert_close((gradient.double() * direction).sum(), difference, rtol=1e-2, atol=5e-3, msg=n)
