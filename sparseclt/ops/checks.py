"""Checks of arguments, shared by the ops: each error names the argument, what was expected and what was given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparseclt.ops._torch_rows import accumulation_dtype
from sparseclt.ops.scratch import AUTOMATIC, default_scratch

_INDEX_DTYPES = (torch.int32, torch.int64)


def check_tensors(**tensors: Tensor | None) -> None:
    """All that are not None are floating-point tensors with the dtype and the device of the first."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point dtype, got {tensor.dtype}")
        if first is None:
            first = name, tensor
        elif tensor.dtype != first[1].dtype:
            raise TypeError(f"{name}: expected {first[1].dtype}, the dtype of {first[0]}, got {tensor.dtype}; cast one")
        else:
            check_device(name, tensor, *first)


def check_wide(name: str, tensor: Tensor | None, other_name: str, other: Tensor) -> None:
    """`check_tensors` of `tensor` beside `other`, except that it may be in float32 where that is in fp16 or bf16."""
    if isinstance(tensor, Tensor) and tensor.dtype == accumulation_dtype(other.dtype):
        check_device(name, tensor, other_name, other)
    else:
        check_tensors(**{other_name: other, name: tensor})


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected on {other.device}, where {other_name} is, got {tensor.device}; move one")


def check_shapes(**tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Compare shapes with letters, as in `x=(x, "N D")`, each of which stands for one size. Returns the sizes."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, (tensor, letters) in tensors.items():
        if tensor is None:
            continue
        got, expected = tuple(tensor.shape), letters.split()
        known = [f"{x}={sizes[x][0]} as in {sizes[x][1]}" for x in expected if x in sizes]
        if len(got) != len(expected) or any(
            x in sizes and sizes[x][0] != size for x, size in zip(expected, got, strict=True)
        ):
            where = f" ({', '.join(known)})" if known else ""
            raise ValueError(f"{name}: expected shape [{', '.join(expected)}]{where}, got {got}")
        for letter, size in zip(expected, got, strict=True):
            sizes.setdefault(letter, (size, name))
    return {letter: size for letter, (size, _) in sizes.items()}


def shape_like(name: str, tensor: Tensor, *alternatives: str) -> str:
    """The one of several letterings, as "F D" and "F T D", that has the tensor's number of axes."""
    for letters in alternatives:
        if len(letters.split()) == tensor.ndim:
            return letters
    expected = " or ".join(f"[{', '.join(letters.split())}]" for letters in alternatives)
    raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")


def check_indices(name: str, indices: Tensor) -> None:
    """An integer tensor that may hold ids."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(indices).__name__}")
    if indices.dtype not in _INDEX_DTYPES:
        raise TypeError(f"{name}: expected int32 or int64, got {indices.dtype}")


def check_range(name: str, indices: Tensor, count: int, what: str) -> None:
    """Every index is -1 (empty) or the id of one of `count` latents. Synchronises with the device."""
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in indices.aminmax())
    if low < -1 or high >= count:
        raise ValueError(f"{name}: expected ids from -1 (empty) to {count - 1} ({count} {what}), got {low}..{high}")


def check_ids(name: str, indices: Tensor, count: int, what: str) -> None:
    """`check_range` where it is cheap: on the CPU. It reads values: call it in kernels, not in traced code."""
    if indices.device.type == "cpu" and not torch.compiler.is_compiling():
        check_range(name, indices, count, what)


def check_k(k: int, latents: int, name: str = "k") -> None:
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{name}: expected an int, got {type(k).__name__}")
    if not 1 <= k <= latents:
        raise ValueError(f"{name}: expected from 1 to F={latents} (latents of W_enc), got {k}")


def check_name(argument: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {name!r}")


def check_scratch(scratch_bytes: int | None, op: str, backend: str) -> int:
    """The scratch asked for or, for None, the default of the op on the backend, or AUTOMATIC."""
    if scratch_bytes is None:
        return AUTOMATIC if backend == "triton" else default_scratch(op, backend)
    if not isinstance(scratch_bytes, int) or isinstance(scratch_bytes, bool):
        raise TypeError(f"scratch_bytes: expected an int or None, got {type(scratch_bytes).__name__}")
    if scratch_bytes < 0:
        raise ValueError(f"scratch_bytes: expected at least 0, got {scratch_bytes}")
    return scratch_bytes
