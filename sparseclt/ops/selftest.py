"""How far every op is from float64 on the hardware at hand: `sparseclt selftest`, or `python -m sparseclt.ops.selftest`
where only torch is installed.

For each op, dtype and backend: the largest error of the outputs and of each gradient against float64 computed
from the same (rounded) inputs, beside that of plain torch in the same dtype (the reference backend). An op passes
while its error is at most twice that of plain torch, plus one rounding.

Ops that select latents are held to their own selection: a selected value must be the pre-activation of the latent that
it names, and no worse than the true one of the same rank; gradients are compared with the true ones at those latents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseclt import ops
from sparseclt.ops.attention_encode import attention_pre_activations
from sparseclt.ops.backend import choose
from sparseclt.ops.connected_encode import connected_pre_activations
from sparseclt.ops.jumprelu_encode import jumprelu_reference
from sparseclt.ops.select_connections import connection_scores
from sparseclt.ops.topk_encode import pre_activations

# By how much an error may exceed twice that of plain torch, in parts of 1 + the largest true value: one rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
INTERPRETED_SIZES = {"N": 12, "D": 24, "F": 90, "U": 100}
Inputs = dict[str, Any]
Errors = dict[str, float]  # of the "forward" pass, then of the gradient of each input


@dataclass(frozen=True)
class Case:
    """An op on given inputs. `dense` (of ops that select): the numbers to select from, along the last axis, in ordinary
    torch."""

    op: str
    inputs: Inputs
    dense: Callable[..., Tensor] | None = None

    @property
    def name(self) -> str:
        activation = self.inputs.get("activation", "topk")
        return self.op if activation == "topk" else f"{self.op} {activation}"


def numbers(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Normal float64 numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def ids(*shape: int, count: int, seed: int, empty: float = 0.2) -> Tensor:
    """Ids in 0..count-1 with duplicates, a share of them -1."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, max(count, 1), shape, generator=generator)
    return indices.masked_fill(torch.rand(shape, generator=generator) < (empty if count else 1), -1)


def distinct_ids(F: int, C: int, count: int, seed: int, empty: float = 0.2) -> Tensor:
    """Ids [F, C] in 0..count-1, distinct in a row, a share of them -1 (and all that exceed count)."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(F, max(count, C), generator=generator).argsort(1)[:, :C]
    drop = torch.rand(F, C, generator=generator) < empty
    return indices.masked_fill(drop | (indices >= count), -1)


def cases(N: int = 40, D: int = 64, F: int = 300, K: int = 8, C: int = 9, U: int = 500, S: int = 12) -> list[Case]:
    """Every op once per activation, on inputs in float64 and on the CPU."""
    encoder: Inputs = {
        "x": numbers(N, D, seed=1),
        "W_enc": numbers(F, D, seed=2, scale=D**-0.5),
        "b_enc": numbers(F, seed=3, scale=0.1) - 2.0,  # some rows have fewer than K positive pre-activations
    }
    rows: Inputs = {"W_enc": encoder["W_enc"], "E": numbers(U, D, seed=4, scale=D**-0.5)}
    connections = distinct_ids(F, C, U, seed=5)
    upstream: Inputs = {
        "z_values": numbers(N, S, seed=6).abs(),
        "z_indices": ids(N, S, count=U, seed=7),
        "V": numbers(F, C, seed=8, scale=C**-0.5),
        "connections": connections,
        "upstream": U,
    }
    jump: Inputs = {"threshold": numbers(F, seed=9).abs() * 0.2 + 0.3, "bandwidth": 0.5}
    reader: Inputs = {"r0": encoder["x"], "W_enc": encoder["W_enc"], "b_enc": encoder["b_enc"]}
    scale: Inputs = {"scale": numbers(N, seed=10).abs() + 0.5, "k": K}
    decoder: Inputs = {"W_dec": numbers(F, 3, D, seed=11), "b_dec": numbers(3, D, seed=12)}
    active: Inputs = {"values": numbers(N, K, seed=13).abs(), "indices": ids(N, K, count=F, seed=14)}
    length = N // 2  # attention reads two sequences
    by_head: Inputs = {
        "x": numbers(2, length, D, seed=1),
        "z_values": numbers(2, length, S, seed=6).abs(),
        "z_indices": ids(2, length, S, count=U, seed=7),
        "V": numbers(2, F, C, seed=8, scale=C**-0.5),
        "mix": numbers(2, 2, length, length, seed=16).abs().tril() / length,
        "k": K,
    }
    importance: Inputs = {"importance": numbers(U, seed=15).abs(), "C": C}
    return [
        Case("topk_encode", encoder | {"k": K}, _pre),
        Case("topk_encode", encoder | {"k": K, "activation": "abstopk"}, _pre),
        Case("topk_encode", encoder | {"k": K, "activation": "groupmax"}, _pre),
        Case("batchtopk_encode", encoder | {"k": K}, _pre),
        Case("jumprelu_encode", encoder | jump, _pre),
        Case("sparse_decode", active | decoder),
        Case("virtual_weights", rows | {"connections": connections}),
        Case("virtual_matmul", upstream),
        Case("connected_encode", reader | upstream | scale, _connected_pre),
        Case("attention_encode", encoder | upstream | by_head, _attention_pre),
        Case("select_connections", rows | importance, _scores),
    ]


def _pre(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, **_: Any) -> Tensor:
    return pre_activations(x, W_enc, b_enc)


def _connected_pre(connections: Tensor, upstream: int, k: int, **tensors: Tensor) -> Tensor:
    return connected_pre_activations(**tensors, connections=ops.Connections(connections, upstream))


def _attention_pre(connections: Tensor, upstream: int, k: int, **tensors: Tensor) -> Tensor:
    return attention_pre_activations(**tensors, connections=ops.Connections(connections, upstream))


def _scores(W_enc: Tensor, E: Tensor, importance: Tensor, **_: Any) -> Tensor:
    return connection_scores(W_enc if W_enc.ndim == 3 else W_enc[None], E, importance)


def cast(inputs: Inputs, dtype: torch.dtype, device: str) -> Inputs:
    """The inputs on the device, floating-point tensors as leaves of the dtype."""
    result = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            result[name] = value.detach().to(device)
            if value.is_floating_point():
                result[name] = result[name].to(dtype).requires_grad_()
    return result


def cotangent(shape: Sequence[int], like: Tensor, seed: int = 99) -> Tensor:
    """The same numbers for every dtype, up to rounding."""
    return numbers(*shape, seed=seed).to(torch.bfloat16).to(like)


def gradients(outputs: Sequence[Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """The gradient of every input that has one, for fixed cotangents."""
    leaves = {name: t for name, t in inputs.items() if isinstance(t, Tensor) and t.requires_grad}
    cotangents = [cotangent(out.shape, out, seed=99 + i) for i, out in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return {name: grad for name, grad in zip(leaves, grads, strict=True) if grad is not None}


def distance(got: Tensor, true: Tensor) -> float:
    """The largest error, in parts of 1 + the largest true value."""
    if got.shape != true.shape:
        return torch.inf
    if true.numel() == 0:
        return 0.0
    error = (got.detach().double() - true.detach()).abs().max() / (1 + true.detach().abs().max())
    return float(error.nan_to_num(torch.inf))


def ranked(values: Tensor, length: int) -> Tensor:
    """All values of ragged rows, largest first, padded with zeros to a length."""
    values = values.double().flatten().sort(descending=True).values
    return torch.cat([values, values.new_zeros(length)])[:length]


def errors(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", **options: Any) -> Errors:
    """How far a backend is from float64 on the inputs as rounded to `dtype`."""
    given = cast(case.inputs, dtype, device)
    exact = cast({n: t.detach() if isinstance(t, Tensor) else t for n, t in given.items()}, torch.float64, device)
    op = getattr(ops, case.op)
    truth = op(**exact, backend="reference")
    result = op(**given, backend=backend, **options)
    if case.dense is None:
        true_gradients = gradients([truth], exact)
        found = {"forward": distance(result, truth)}
        outputs = [result]
    elif case.op == "select_connections":
        score = case.dense(**exact)
        return {"forward": distance(score.gather(1, result), score.gather(1, truth))}
    else:
        outputs, true_outputs, forward = _own_selection(case, exact, result, truth)
        true_gradients, found = gradients(true_outputs, exact), {"forward": forward}
    given_gradients = gradients(outputs, given)
    for name, true in true_gradients.items():
        found[name] = distance(given_gradients[name], true) if name in given_gradients else torch.inf
    return found


def _own_selection(
    case: Case, exact: Inputs, result: tuple[Tensor, ...], truth: tuple[Tensor, ...]
) -> tuple[list[Tensor], list[Tensor], float]:
    """Differentiable outputs, their true values for the latents that were selected, and the error of the values: from
    those, and from the best possible selection."""
    assert case.dense is not None
    values, indices, *counts = result
    dense, columns = case.dense(**exact), indices.clamp_min(0)
    kept, true_counts = values.detach() != 0, []
    if case.op == "jumprelu_encode":
        dense, active, _ = jumprelu_reference(dense, exact["threshold"], exact["bandwidth"])
        kept = indices >= 0
        true_counts = [(active.gather(1, columns) * kept).sum(1)]
    elif case.inputs.get("activation") != "abstopk":
        dense = dense.relu()
    true_values = dense.gather(-1, columns) * kept
    error = distance(values, true_values)
    if case.op in ("batchtopk_encode", "jumprelu_encode"):
        length = max(values.numel(), truth[0].numel())
        best, got = ranked(truth[0].detach(), length), ranked(values.detach(), length)
    elif case.inputs.get("activation") == "abstopk":
        best, got = truth[0].detach().abs(), values.detach().abs()
    else:
        best, got = truth[0].detach(), values.detach()
    return [values, *counts], [true_values, *true_counts], max(error, distance(got, best))


@dataclass(frozen=True)
class Row:
    """One line of the table: the errors of an op under a backend, and those of plain torch in the same dtype."""

    name: str
    dtype: torch.dtype
    backend: str
    found: Errors
    plain: Errors

    def allowed(self, quantity: str) -> float:
        return 2 * self.plain[quantity] + TOLERANCE[self.dtype]

    @property
    def passed(self) -> bool:
        return all(error <= self.allowed(quantity) for quantity, error in self.found.items())


def check(case: Case, dtype: torch.dtype, backend: str, device: str = "cpu", **options: Any) -> Row:
    found = errors(case, dtype, backend, device, **options)
    return Row(case.name, dtype, backend, found, errors(case, dtype, "reference", device))


def runnable(backend: str, dtype: torch.dtype, device: str) -> bool:
    """Whether a backend takes the dtype on the device."""
    try:
        choose("topk_encode", backend, torch.empty(0, dtype=dtype, device=device))
    except (ValueError, TypeError, ImportError):
        return False
    return True


def table(rows: Sequence[Row]) -> str:
    """The errors in Markdown, with the bound in brackets where one exceeds it."""
    lines = ["| op | dtype | backend | forward | gradients | |", "| -- | ----- | ------- | ------: | --------- | - |"]
    for row in rows:
        shown = {
            name: f"{error:.1e}" + ("" if error <= row.allowed(name) else f" (allowed {row.allowed(name):.1e})")
            for name, error in row.found.items()
        }
        forward = shown.pop("forward")
        grads = ", ".join(f"{name} {error}" for name, error in shown.items())
        dtype = str(row.dtype).removeprefix("torch.")
        lines.append(
            f"| {row.name} | {dtype} | {row.backend} | {forward} | {grads} | {'pass' if row.passed else 'FAIL'} |"
        )
    return "\n".join(lines)


def selftest(device: str, backends: Sequence[str], dtypes: Sequence[torch.dtype] = tuple(TOLERANCE)) -> list[Row]:
    """Every op with every backend and dtype that runs on the device."""
    rows = []
    for backend in backends:
        if not any(runnable(backend, dtype, device) for dtype in dtypes):
            choose("topk_encode", backend, torch.empty(0, device=device))  # says why
        interpreted = device == "cpu" and backend == "triton"
        rows += [
            check(case, dtype, backend, device)
            for case in cases(**INTERPRETED_SIZES if interpreted else {})
            for dtype in dtypes
            if runnable(backend, dtype, device)
        ]
    return rows


def main(device: str, names: Sequence[str] = ()) -> int:
    """Prints the table for the named backends, or for all that run on the device: 0 if every op passes, otherwise 1."""
    names = names or [name for name in ("torch", "numba", "triton") if runnable(name, torch.float32, device)]
    rows = selftest(device, names)
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"\n{device}, {', '.join(names)}: {len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main("cuda" if torch.cuda.is_available() else "cpu"))
