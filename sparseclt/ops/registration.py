"""Registration of the ops with `torch.library`: one schema per op, from which everything else is derived.

`Library.define` and `impl` stand in for `torch.library.custom_op`, which adds 3 s to the first call (it imports
torch._dynamo to keep itself from being traced) and 15 us to each.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from sparseclt.ops.scratch import AUTOMATIC, default_scratch

_library = torch.library.Library("sparseclt", "DEF")
kernels: dict[str, Callable[..., Any]] = {}  # what runs under each registered name, as "sparseclt::topk_encode"


@dataclass(frozen=True)
class Implementation:
    """What a backend runs for an op, with checked arguments in the order of the op's schema.

    `backward` returns one gradient, or None, for each differentiable input. `reads_order`: the forward pass reads
    `order` and `starts` of the connections, so that they are worth sorting without a gradient, too.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    reads_order: bool = False

    @property
    def gradients(self) -> Callable[..., Any]:
        assert self.backward is not None, "an op without a gradient"
        return self.backward


class Operator:
    """The operator `sparseclt::NAME`: compile, export and fake tensors treat it as one node. Call it with positional
    arguments.

    `schema`: "NAME(inputs, str backend) -> outputs", with named outputs where there are several. `backends`: a
    function for each backend that imports and returns its implementation, called at first use. `fake(*inputs)`:
    empty outputs of the right shapes and dtypes. `check(*inputs)`: runs before any backend, on real tensors only.

    `forward`: the inputs that a backend's `forward` takes (None: all of them).

    `backward`: "arguments -> inputs": the arguments of a backend's `backward`, and the inputs that it differentiates
    by. Arguments are named after inputs and outputs; `grad_OUTPUT` is the gradient of an output (`grad` where there is
    a single unnamed one), and an output without it is not differentiable; `needed` lists which gradients are wanted.
    This becomes the operator `NAME_backward`, which has no derivative itself. A gradient has the shape of its input;
    for an input that is not among the arguments, as b_enc [F], `vectors` names the matrix that has as many rows
    ("b_enc": "W_enc").
    """

    def __init__(
        self,
        schema: str,
        backends: Mapping[str, Callable[[], Implementation]],
        fake: Callable[..., Any],
        *,
        check: Callable[..., None] | None = None,
        forward: str | None = None,
        backward: str | None = None,
        vectors: Mapping[str, str] | None = None,
    ):
        self.name, inputs, outputs = _parse(schema)
        self.backends = dict(backends)
        self._loaded: dict[str, Implementation] = {}
        self._fake, self._check, self._vectors = fake, check, vectors or {}
        self._names = names = list(inputs)
        self._read_forward = _getter(names.index(name) for name in forward.split(", ")) if forward else None
        if backward is not None:
            self._prepare_backward(inputs, outputs, backward)
        self._call = _define(
            schema, self._run, lambda *args: fake(*args[:-1]), self._differentiate if backward else None, self._save
        )

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def implementation(self, backend: str) -> Implementation:
        """What `backend`, as `choose` gave it, runs for this op. Imports an optional backend at first use."""
        if backend not in self._loaded:
            self._loaded[backend] = self.backends[backend]()
        return self._loaded[backend]

    def _with_scratch(self, args: tuple[Any, ...], names: Sequence[str]) -> tuple[Any, ...]:
        """`args`, named `names` and followed by the backend, with a number for an AUTOMATIC `scratch_bytes`."""
        if "scratch_bytes" not in names or args[place := names.index("scratch_bytes")] != AUTOMATIC:
            return args
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        return (*args[:place], default_scratch(self.name, args[-1], device), *args[place + 1 :])

    def _run(self, *args: Any) -> Any:
        args = self._with_scratch(args, self._names)
        inputs = args[:-1]
        if self._check is not None:
            self._check(*inputs)
        if self._read_forward is not None:
            inputs = self._read_forward(inputs)
        return self.implementation(args[-1]).forward(*inputs)

    def _prepare_backward(self, inputs: dict[str, str], outputs: list[str], backward: str) -> None:
        reads, _, differentiated = backward.partition(" -> ")
        self._reads, self._differentiated = reads.split(", "), differentiated.split(", ")
        grads = [f"grad_{name}" if name else "grad" for name in outputs]
        types = inputs | {name: "Tensor" for name in (*outputs, *grads)} | {"needed": "bool[]"}
        results = ", ".join("Tensor" for _ in self._differentiated)
        arguments = ", ".join(f"{types[name]} {name}" for name in self._reads)
        self._call_backward = _define(
            f"{self.name}_backward({arguments}, str backend) -> ({results})", self._run_backward, self._fake_backward
        )
        # Selections of tuples, prepared because small calls consist of little else: of inputs and outputs side by side,
        # and of what a backward pass has at hand.
        places = {name: place for place, name in enumerate((*inputs, *outputs))}
        self._inputs = [places[name] for name in self._differentiated]
        kept = [name for name in self._reads if name not in grads and name != "needed"]
        tensors = [name for name in kept if types[name].startswith("Tensor")]
        others = [name for name in kept if name not in tensors] + ["backend"]
        self._tensors, self._others = (_getter(places[name] for name in names) for names in (tensors, others))
        self._constant = [place for place, grad in enumerate(grads) if grad not in self._reads]
        available = [*grads, *tensors, *others, "needed"]
        self._arrange = _getter(available.index(name) for name in (*self._reads, "backend"))

    def _save(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        values = inputs + outputs
        ctx.save_for_backward(*self._tensors(values))
        ctx.others = self._others(values)
        if self._constant:
            ctx.mark_non_differentiable(*[outputs[place] for place in self._constant])

    def _differentiate(self, ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        needed = [needs[place] for place in self._inputs]
        gradients = self._call_backward(*self._arrange((*grads, *ctx.saved_tensors, *ctx.others, needed)))
        result: list[Tensor | None] = [None] * len(needs)
        for place, gradient in zip(self._inputs, gradients, strict=True):
            if needs[place]:
                result[place] = gradient
        return tuple(result)

    def _run_backward(self, *args: Any) -> tuple[Tensor, ...]:
        args = self._with_scratch(args, self._reads)
        gradients = self.implementation(args[-1]).gradients(*args[:-1])
        return tuple([torch.empty(0) if gradient is None else gradient for gradient in gradients])

    def _fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        read = dict(zip(self._reads, args, strict=False))  # without the backend

        def like(name: str) -> Tensor:
            if name in read:
                return read[name].new_empty(read[name].shape)
            matrix: Tensor = read[self._vectors[name]]
            return matrix.new_empty(len(matrix))

        pairs = zip(self._differentiated, read["needed"], strict=True)
        return tuple(like(name) if wanted else torch.empty(0) for name, wanted in pairs)


def _getter(places: Iterable[int]) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """`itemgetter`, which gives a tuple for a single place, too."""
    first, *rest = places
    return itemgetter(first, *rest) if rest else lambda values: (values[first],)


def _parse(schema: str) -> tuple[str, dict[str, str], list[str]]:
    """The name, the type of each argument, and the names of the results ("" for a single unnamed one)."""
    match = re.fullmatch(r"(\w+)\((.*)\) -> \(?(.*?)\)?", schema)
    assert match is not None, schema
    name, arguments, results = match.groups()
    pairs = [argument.split() for argument in arguments.split(", ")]
    return name, {argument: type_ for type_, argument in pairs}, [r.partition(" ")[2] for r in results.split(", ")]


def _define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Registers a kernel that computes fresh tensors, which alias no argument: the operator, callable."""
    short = schema.partition("(")[0]
    name = f"sparseclt::{short}"
    _library.define(schema)
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_library)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"{name} has no derivative: its op can be differentiated once")

    save = save if backward else None
    torch.library.register_autograd(name, backward or refuse, setup_context=save, lib=_library)
    kernels[name] = kernel
    operator: Callable[..., Any] = getattr(torch.ops.sparseclt, short).default
    return operator
