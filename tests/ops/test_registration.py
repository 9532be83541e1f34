"""The operators as torch sees them: schemas, fake tensors, autograd, compile."""

from typing import Any

import pytest
import torch
from op_helpers import BACKENDS, DEVICE, distinct_ids, rows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from sparseclt import ops
from sparseclt.ops import registration, selftest

SIZES = {"N": 6, "D": 8, "F": 30, "K": 3, "C": 3, "U": 20, "S": 4}
CASES = {case.name: case for case in selftest.cases(**SIZES)}
DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in BACKENDS
    for dtype in selftest.TOLERANCE
    if selftest.runnable(name, dtype, DEVICE)
]


class Calls(TorchDispatchMode):
    """Remembers the calls of our operators, arguments copied."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "sparseclt":
            copy = tree_map(lambda a: a.detach().clone() if isinstance(a, torch.Tensor) else a, args)
            self.calls.append((func, copy))
        return func(*args, **(kwargs or {}))


def run(case: selftest.Case, dtype: torch.dtype, backend: str) -> None:
    inputs = selftest.cast(case.inputs, dtype, DEVICE)
    result = getattr(ops, case.op)(**inputs, backend=backend)
    results = result if isinstance(result, tuple) else (result,)
    outputs = [out for out in results if out.requires_grad]
    if outputs:
        selftest.gradients(outputs, inputs)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("backend", "dtype"), DTYPES)
def test_opcheck(name, backend, dtype):
    with Calls() as recorded:
        run(CASES[name], dtype, backend)
    for operator, args in recorded.calls:
        if not operator.name().endswith(("_backward", "select_connections")):
            for tensor in args:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    tensor.requires_grad_()
        torch.library.opcheck(operator, args)
    assert len(recorded.calls) >= 1 + (CASES[name].op != "select_connections")


def test_every_operator_is_checked():
    with Calls() as recorded:
        for case in CASES.values():
            run(case, torch.float32, "torch")
    assert {operator.name() for operator, _ in recorded.calls} == set(registration.kernels)


class SAE(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend
        self.W_enc, self.W_dec = (torch.nn.Parameter(rows(30, 8, seed=s).float()) for s in (1, 2))
        self.b_enc, self.b_dec = (torch.nn.Parameter(rows(n, seed=n).float()) for n in (30, 8))

    def forward(self, x):
        values, indices = ops.topk_encode(x - self.b_dec, self.W_enc, self.b_enc, 3, backend=self.backend)
        return ops.sparse_decode(values, indices, self.W_dec, self.b_dec, backend=self.backend)


class Connected(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend
        self.W_enc, self.E = (torch.nn.Parameter(rows(n, 8, seed=n).float()) for n in (30, 20))
        self.connections = ops.Connections(distinct_ids(30, 3, count=20), 20)

    def forward(self, x):
        V = ops.virtual_weights(self.W_enc, self.E, self.connections, backend=self.backend)
        z, places = ops.topk_encode(x, self.E, None, 4, backend=self.backend)
        scale = torch.ones_like(x[:, 0])
        values, indices = ops.connected_encode(
            x, self.W_enc, None, z, places, V, self.connections, scale, 3, backend=self.backend
        )
        dense = ops.virtual_matmul(z, places, V, self.connections, backend=self.backend)
        return values.sum(1) + dense.square().sum(1) + indices[:, 0]


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("module", [SAE, Connected])
def test_compiles_as_one_graph(module, backend, compiler):
    torch._dynamo.reset()
    model, x = module(backend), rows(6, 8, seed=5).float().requires_grad_()
    leaves = [x, *model.parameters()]
    expected = model(x)
    expected_grads = torch.autograd.grad(expected.sum(), leaves)
    got = torch.compile(model, fullgraph=True, backend=compiler)(x)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), leaves), expected_grads)


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bare", [False, True])
def test_compiles_with_connections_that_were_never_sorted(backend, bare):
    torch._dynamo.reset()

    def weights(W_enc, E, connections):
        V = ops.virtual_weights(W_enc, E, connections, backend=backend)
        z, places = ops.topk_encode(E[:5], E, None, 4, backend=backend)
        return ops.virtual_matmul(z, places, V, connections, upstream=20, backend=backend)

    W_enc, E = (rows(n, 8, seed=n).float().requires_grad_() for n in (30, 20))
    ids = distinct_ids(30, 3, count=20)
    got = torch.compile(weights, fullgraph=True, backend="aot_eager")(
        W_enc, E, ids if bare else ops.Connections(ids, 20)
    )
    expected = weights(W_enc, E, ops.Connections(ids, 20))
    torch.testing.assert_close(got, expected)
    for one, two in zip(*(torch.autograd.grad(y.square().sum(), (W_enc, E)) for y in (got, expected)), strict=True):
        torch.testing.assert_close(one, two)


def test_an_op_differentiated_twice_says_that_it_cannot():
    W = rows(7, 4).requires_grad_()
    values, _ = ops.topk_encode(rows(3, 4), W, None, 2)
    (grad,) = torch.autograd.grad(values.square().sum(), W, create_graph=True)
    with pytest.raises(RuntimeError, match=r"encode_backward has no derivative"):
        grad.sum().backward()
