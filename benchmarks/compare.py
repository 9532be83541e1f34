"""One comparison: a gate, then memory, then interleaved rounds; its rows go to the report."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import torch
from measure import Ceiling, Effort, Weighed, errors, interleave, measure_ceiling, quartiles, weigh
from problems import PROBLEMS, contenders, cost, seed_inputs, spread
from torch import Tensor

from sparseclt.costs import Cost

Row = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """`prepare()` does the untimed part and returns the function to time. `truth`: which of the comparison's truths its
    results must equal; None for a floor, which computes something else and passes no gate."""

    prepare: Callable[[], Callable[[], Any]]
    cost: Cost
    truth: str | None = "reference"


@dataclass(frozen=True)
class Comparison:
    """Contenders for one piece of work on the same inputs.

    `results` turns the result of a call into named tensors; `truths` are such tensors, from implementations that the
    gate trusts. `tolerance`: relative error, by name of a tensor ("": all others)."""

    case: str
    direction: str
    sizes: dict[str, int]
    device: str
    contenders: Mapping[str, Contender]
    truths: Mapping[str, Callable[[], dict[str, Tensor]]]
    results: Callable[[Any], dict[str, Tensor]]
    tolerance: Mapping[str, float]
    parameters: Callable[[], list[Tensor]] = list
    labels: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def run(self, effort: Effort, small: bool) -> dict[str, Row]:
        """One row per contender: measured, or {"failed": why}."""
        rows = {name: self._header(name) for name in self.contenders}
        truths = {name: truth() for name, truth in self.truths.items()}
        ready: dict[str, tuple[Callable[[], Any], Weighed]] = {}
        for name, contender in self.contenders.items():
            try:
                function = contender.prepare()
                weighed = weigh(function, self.parameters())
                gate = {}
                if contender.truth is not None:
                    gate = errors(self.results(weighed.results), truths[contender.truth])
            except Exception as error:  # a peer may fail: its row says so, and the others are measured
                rows[name]["failed"] = f"{type(error).__name__}: {error}"[:300]
                continue
            rows[name]["gate"] = {"errors": gate, "tolerance": dict(self.tolerance)}
            wrong = {what: e for what, e in gate.items() if not e <= self.tolerance.get(what, self.tolerance[""])}
            if wrong:
                worst = max(wrong, key=lambda what: wrong[what])
                rows[name]["failed"] = f"wrong result: relative error of {worst} is {wrong[worst]:.2g}"
                continue
            ready[name] = function, Weighed(None, weighed.seconds, weighed.allocated, weighed.resident)
        truths.clear()
        ceiling = measure_ceiling(self.dtype, self.device, small)
        samples = interleave(
            {name: function for name, (function, _) in ready.items()},
            {name: weighed.seconds for name, (_, weighed) in ready.items()},
            effort,
        )
        for name, (_, weighed) in ready.items():
            rows[name] |= self._measured(name, weighed, samples, ceiling)
        return rows

    def _header(self, name: str) -> Row:
        return {
            "case": self.case, "direction": self.direction, "contender": name, "shapes": self.sizes,
            "dtype": str(self.dtype).removeprefix("torch."), "device": device_name(self.device),
            "threads": torch.get_num_threads(), "versions": versions(), **self.labels,
        }  # fmt: skip

    def _measured(self, name: str, weighed: Weighed, samples: Mapping[str, Any], ceiling: Ceiling) -> Row:
        cost, own = self.contenders[name].cost, samples[name].seconds
        time = quartiles(own)
        least = ceiling.seconds(cost.flops, cost.used)
        return {
            "seconds": time, "samples": own, "rounds": len(own), "calls": samples[name].calls,
            "peak_bytes": weighed.allocated, "resident_bytes": weighed.resident,
            "flops": cost.flops, "bytes": cost.used,
            "ceiling": {"flops": ceiling.flops, "bytes": ceiling.bytes}, "achieved": least / time["median"],
            "ratios": {
                other: quartiles([theirs / ours for theirs, ours in zip(them.seconds, own, strict=True)])
                for other, them in samples.items()
                if other != name
            },
        }  # fmt: skip


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("sparseclt", "numba", "triton", "eai-sparsify"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def op_comparison(
    op: str, direction: str, sizes: dict[str, int], device: str, dtype: torch.dtype, strict: bool
) -> Comparison:
    """An op's contenders on one set of inputs, against its shipped reference.

    Backward: the gradients of all differentiable inputs, given a gradient of the result that depends on the latents
    and not on the order of slots. `strict`: shapes so small that top-k meets no near-equal latents.
    """
    problem, backward = PROBLEMS[op], direction == "backward"
    seed_inputs()
    inputs = problem.inputs(device, **sizes)
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            setattr(inputs, name, value.to(dtype))
    differentiable = [getattr(inputs, name) for name in problem.differentiable]
    grads: dict[torch.Size, Tensor] = {}
    by_latent = torch.randn(sizes.get("F", 1), device=device).to(dtype)

    def gradients_of(out: Any) -> tuple[Tensor, Tensor]:
        if isinstance(out, tuple):
            return out[0], by_latent[out[1].clamp_min(0)]
        if problem.results is spread:
            return out, by_latent.expand_as(out)
        return out, grads.setdefault(out.shape, torch.randn(out.shape, device=device).to(dtype))

    def prepared(function: Callable[[Any], Any]) -> Callable[[], Any]:
        if not backward:
            return torch.no_grad()(lambda: function(inputs))
        for tensor in differentiable:
            tensor.requires_grad_()
        out, grad = gradients_of(function(inputs))
        return lambda: torch.autograd.grad(out, differentiable, grad, retain_graph=True)

    def named(result: Any) -> dict[str, Tensor]:
        if backward:
            return dict(zip(problem.differentiable, result, strict=True))
        with torch.no_grad():
            return problem.results(inputs, result)

    entries = {
        name: Contender(partial(prepared, function), cost(op, name, backward, dtype.itemsize, **sizes))
        for name, function in contenders(op, device).items()
    }
    exact = 1e-4 if dtype == torch.float32 else 3e-2
    tolerance = {"values": exact, "": exact if strict or not problem.loose else max(2e-2, 5 * exact)}

    def reference() -> dict[str, Tensor]:
        if problem.truth is not None:
            return problem.truth(inputs)
        return named(prepared(lambda i: problem.ours(i, "reference"))())

    return Comparison(
        op, direction, sizes, device, entries, {"reference": reference}, named, tolerance, dtype=dtype
    )  # fmt: skip


def directions(op: str) -> list[str]:
    return ["forward", "backward"] if PROBLEMS[op].differentiable else ["forward"]


def cases(shapes: Mapping[str, list[dict[str, int]]]) -> list[tuple[str, str, dict[str, int]]]:
    return [(op, way, sizes) for op in shapes for way, sizes in product(directions(op), shapes[op])]
