"""Shared by the tests of the kernels: inputs, guarded output buffers, comparison against two oracles.

The same tests run on a GPU where there is one, and in Triton's interpreter where there is none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
WILD = 0x7A7A7A7A  # an integer that no op returns
CANARY = 0xA5

Inputs = dict[str, Any]


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def ids(*shape: int, count: int, seed: int = 0, empty: float = 0.2, dtype: torch.dtype = torch.int64) -> Tensor:
    """Ids in 0..count-1 with duplicates; a share of `empty` is -1."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, max(count, 1), shape, generator=generator)
    drop = torch.rand(shape, generator=generator) < (empty if count else 1)
    return indices.masked_fill(drop, -1).to(DEVICE, dtype)


def distinct_ids(rows: int, slots: int, *, count: int, seed: int = 0, empty: float = 0.2) -> Tensor:
    """Ids [rows, slots] without duplicates in a row, like `connections`; a share of `empty` is -1."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(rows, count, generator=generator).argsort(1)[:, :slots]
    drop = torch.rand(indices.shape, generator=generator) < empty
    return indices.masked_fill(drop, -1).to(DEVICE)


def strided(tensor: Tensor) -> Tensor:
    """The same numbers with a gap behind every element and row, like a view of a larger tensor."""
    wide = tensor.new_full([2 * n + 1 for n in tensor.shape], torch.nan if tensor.is_floating_point() else WILD)
    view = wide[tuple(slice(0, 2 * n, 2) for n in tensor.shape)]
    return view.copy_(tensor)


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers as a transpose view of a contiguous tensor."""
    return tensor.T.contiguous().T


class Guarded(TorchFunctionMode):
    """While active, fresh buffers are poisoned (NaN, or a wild integer) and lie between canaries.

    An entry that a kernel leaves unwritten shows as NaN in the comparison; a write outside the buffer kills a canary,
    which raises at the end of the block.
    """

    _empty = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided}
    _zeros = {torch.zeros, torch.zeros_like, Tensor.new_zeros}

    def __init__(self) -> None:
        super().__init__()
        self.guards: list[tuple[Tensor, str]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func not in self._empty | self._zeros or out.numel() == 0 or out.device.type == "meta":
            return out
        guarded = self._between_canaries(out)
        if func in self._zeros:
            return guarded.zero_()
        if out.is_floating_point():
            return guarded.fill_(torch.nan)
        return guarded.fill_(out.dtype == torch.bool or min(WILD, torch.iinfo(out.dtype).max))

    def _between_canaries(self, like: Tensor) -> Tensor:
        extent = 1 + sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True))
        size = like.element_size()
        guard = 16 * size * max(64, like.shape[-1])  # several rows
        storage = torch.full((2 * guard + extent * size,), CANARY, dtype=torch.uint8, device=like.device)
        what = f"{like.dtype} {tuple(like.shape)}"
        self.guards += [(storage[:guard], f"before {what}"), (storage[-guard:], f"behind {what}")]
        body = storage[guard : guard + extent * size].view(like.dtype)
        return body.as_strided(like.shape, like.stride(), body.storage_offset())

    def __exit__(self, exc_type, exc, trace) -> None:  # type: ignore[no-untyped-def]
        super().__exit__(exc_type, exc, trace)
        if exc_type is None:
            for guard, where in self.guards:
                assert bool((guard == CANARY).all()), f"a kernel wrote {where}"


def assert_slots(values: Tensor, indices: Tensor, kept: Tensor, true: Tensor) -> None:
    """Slots are the `kept` [N, F] latents with their `true` values, descending, ties by index, then padding."""
    assert values.shape == indices.shape == (len(kept), int(kept.sum(1).max()))
    for n, row in enumerate(kept):
        ids = row.nonzero().flatten()
        ids = ids[true[n, ids].sort(descending=True, stable=True).indices]
        assert indices[n, : len(ids)].tolist() == ids.tolist()
        assert bool((indices[n, len(ids) :] == -1).all()) and not values[n, len(ids) :].any()
        torch.testing.assert_close(values[n, : len(ids)].double(), true[n, ids], rtol=0, atol=1e-5, equal_nan=True)


def truth_and_peer(op: Callable, inputs: Inputs, cotangent_of: int = 0, **options: Any) -> tuple[Inputs, Inputs]:
    """Outputs ("out0", ...) and gradients (by input name) of the reference, in float64 and in the inputs' dtype.

    The float inputs are of the dtype under test; truth takes the same numbers in float64. `cotangent` holds the
    gradient of output `cotangent_of` that both were given, in the dtype under test.
    """
    cotangent: Tensor | None = None
    results = []
    for double in (True, False):
        leaves = {
            name: (value.double() if double else value).detach().clone().requires_grad_()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }
        out = op(**leaves, backend="reference", **options)
        outs = out if isinstance(out, tuple) else (out,)
        wanted = {n: t for n, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
        if cotangent is None:
            dtype = next(v.dtype for v in inputs.values() if isinstance(v, Tensor) and v.is_floating_point())
            cotangent = rows(*outs[cotangent_of].shape, dtype=dtype, seed=99)
        target = outs[cotangent_of]
        grads = torch.autograd.grad(target, list(wanted.values()), cotangent.to(target.dtype), allow_unused=True)
        result = {f"out{i}": o.detach() for i, o in enumerate(outs)}
        results.append(result | dict(zip(wanted, grads, strict=True)) | {"cotangent": cotangent})
    return results[0], results[1]


def assert_accurate(ours: Tensor, peer: Tensor, truth: Tensor, what: str = "") -> None:
    """Our largest error is at most twice that of torch in the same dtype, plus a rounding unit (fp32: 1e-6)."""
    assert ours.dtype == peer.dtype, f"{what}: {ours.dtype}, expected {peer.dtype}"
    assert ours.shape == truth.shape, f"{what}: {tuple(ours.shape)}, expected {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    assert torch.equal(ours.isnan(), truth.isnan()), f"{what}: NaN in other places than in the truth"
    if bool(truth.isnan().all()):
        return
    errors = [(x.double() - truth).nan_to_num(0).abs().max().item() for x in (ours, peer)]
    unit = 1e-6 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps
    allowed = 2 * errors[1] + unit * max(1.0, truth.nan_to_num(0).abs().max().item())
    assert errors[0] <= allowed, f"{what}: error {errors[0]:.3g}, allowed {allowed:.3g} (torch {errors[1]:.3g})"


def assert_same_bits(*results: Tensor | tuple[Tensor, ...]) -> None:
    """All results are equal to the last bit."""
    first, *others = (r if isinstance(r, tuple) else (r,) for r in results)
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)) and torch.equal(a.isnan(), b.isnan())
