"""What the tests of the ops share: gradients under any backend and dtype, comparison, the largest allocation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparseclt.ops import registration, selftest

Inputs = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Compiled backends that run here: on a GPU, or (triton) interpreted.
COMPILED = [name for name in ("triton",) if selftest.runnable(name, torch.float32, DEVICE)]
# Those that take float64, too; numba's functions are quick, unlike interpreted ones.
WIDE = ["torch", *(name for name in ("numba",) if selftest.runnable(name, torch.float64, DEVICE))]
BACKENDS = [*WIDE, *COMPILED]


def rows(*shape: int, seed: int = 0) -> Tensor:
    """Normal float64 numbers that float32 holds exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double().to(DEVICE)


def ids(*shape: int, count: int, seed: int = 0, empty: float = 0.2) -> Tensor:
    """Ids in 0..count-1 with duplicates, a share of them -1."""
    return selftest.ids(*shape, count=count, seed=seed, empty=empty).to(DEVICE)


def distinct_ids(F: int, C: int, count: int, seed: int = 0, empty: float = 0.2) -> Tensor:
    """Ids [F, C] in 0..count-1, distinct in a row, a share of them -1."""
    return selftest.distinct_ids(F, C, count, seed, empty).to(DEVICE)


def outputs_and_gradients(op: Callable, inputs: Inputs, dtype: torch.dtype, **options: Any) -> dict[str, Tensor | None]:
    """Outputs ("out0", ...) and the gradients of every floating input, for a fixed random cotangent."""
    leaves = {
        name: value.to(dtype).detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    out = op(**leaves, **options)
    outs = out if isinstance(out, tuple) else (out,)
    wanted = {n: t for n, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    cotangent = rows(*outs[0].shape, seed=99).to(dtype)
    grads = torch.autograd.grad(outs[0], list(wanted.values()), cotangent, allow_unused=True)
    result: dict[str, Tensor | None] = {f"out{i}": o.detach() for i, o in enumerate(outs)}
    if len(outs) > 1:  # the latent in a slot worth zero is anyone's
        result["out1"] = outs[1].masked_fill(outs[0] == 0, -1)
    return result | dict(zip(wanted, grads, strict=True))


def assert_matches_reference(op: Callable, inputs: Inputs, **options: Any) -> None:
    """Backends equal the reference: to 1e-12 in float64; in float32, as near the float64 truth as it is."""
    truth = outputs_and_gradients(op, inputs, torch.float64, backend="reference")
    peer = outputs_and_gradients(op, inputs, torch.float32, backend="reference")
    for backend in WIDE:
        double = outputs_and_gradients(op, inputs, torch.float64, backend=backend, **options)
        single = outputs_and_gradients(op, inputs, torch.float32, backend=backend, **options)
        for name, true in truth.items():
            what = f"{name} of {backend}"
            if true is None:
                assert double[name] is None and single[name] is None, what
                continue
            assert double[name].dtype == true.dtype and single[name].dtype == peer[name].dtype, what
            assert double[name].shape == single[name].shape == true.shape, what
            if true.numel() == 0:
                continue
            size = 1 + true.abs().max()
            assert (double[name] - true).abs().max() <= 1e-12 * size, what
            assert (single[name] - true).abs().max() <= 2 * (peer[name] - true).abs().max() + 1e-6 * size, what


def assert_repeatable(op: Callable, inputs: Inputs, **options: Any) -> None:
    """Three runs agree to the last bit, gradients too."""
    for backend in WIDE:
        first, *others = (
            outputs_and_gradients(op, inputs, torch.float32, backend=backend, **options) for _ in range(3)
        )
        for other in others:
            for name, value in first.items():
                assert value is None or torch.equal(value, other[name]), f"{name} of {backend}"


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest storage, in elements, that any operation returned while it was active."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kernel = registration.kernels.get(func.name())
        if kernel is None:
            out = func(*args, **(kwargs or {}))
        else:  # one of ours: look inside
            with self:
                out = kernel(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                elements = leaf.untyped_storage().nbytes() // leaf.element_size()
                if elements > self.elements:
                    self.elements, self.by = elements, str(func)
        return out


def largest_allocation(op: Callable, inputs: Inputs, **options: Any) -> int:
    """Elements of the largest tensor met in a forward and backward pass of any backend, inputs included."""
    with LargestAllocation() as largest:
        for backend in WIDE:
            outputs_and_gradients(op, inputs, torch.float32, backend=backend, **options)
    return largest.elements


def encoder_inputs(N: int = 13, D: int = 24, F: int = 37, **more: Any) -> Inputs:
    """A small encoder and its input, float32."""
    return {
        "x": rows(N, D, seed=1).float(),
        "W_enc": rows(F, D, seed=2).float() / D**0.5,
        "b_enc": rows(F, seed=3).float() * 0.1,
    } | more


def pre_activations(case: Inputs) -> Tensor:
    return case["x"] @ case["W_enc"].T + case["b_enc"]


def dense(values: Tensor, indices: Tensor, F: int) -> Tensor:
    """[N, F]"""
    return values.new_zeros(len(values), F).scatter_add(1, indices.clamp_min(0), values)


def assert_gradient_is_that_of_the_kept_values(case: Inputs, values: Tensor, indices: Tensor) -> None:
    """Against autograd through a gather from dense pre-activations; `case` holds the leaves."""
    leaves = [case[name] for name in ("x", "W_enc", "b_enc")]
    weights = rows(*values.shape, seed=9).to(values)
    got = torch.autograd.grad((values * weights).sum(), leaves)
    kept = pre_activations(case).gather(1, indices.clamp_min(0)) * (values != 0)
    torch.testing.assert_close(got, torch.autograd.grad((kept * weights).sum(), leaves), rtol=1e-4, atol=1e-5)
    unused = torch.ones(len(case["b_enc"]), dtype=torch.bool, device=values.device)
    unused[indices[values != 0]] = False
    assert (got[1][unused] == 0).all() and (got[2][unused] == 0).all()
