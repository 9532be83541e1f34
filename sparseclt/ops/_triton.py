"""The triton backend: launchers of csrc_triton behind the ops. Imported when first asked for; needs triton."""

from importlib import import_module

from torch import Tensor

from sparseclt.ops._rows import Transpose
from sparseclt.ops.backend import register
from sparseclt.ops.virtual_matmul import Upstream

# By module: what csrc_triton exports under an op's name need not be the module.
_rows = import_module("csrc_triton.rows")
_topk = import_module("csrc_triton.topk_encode")
_decode = import_module("csrc_triton.sparse_decode")
_weights = import_module("csrc_triton.virtual_weights")
_matmul = import_module("csrc_triton.virtual_matmul")
_connected = import_module("csrc_triton.connected_encode")
_ragged = import_module("csrc_triton.ragged")
_select = import_module("csrc_triton.select_connections")


def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, activation: str, scratch_bytes: int
) -> tuple[Tensor, Tensor]:
    return _topk.forward(x, W_enc, b_enc, k, scratch_bytes, activation)


def encode_backward(
    grad_values: Tensor, values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    # Slots with any value, of either sign: those of the other activations have no negative ones.
    return _topk.backward(grad_values, values, indices, x, W_enc, needed, "abstopk")


def transposed_gather_sum(weights: Tensor, transposed: Transpose, bags: Tensor) -> Tensor:
    return _rows.transposed_gather_sum(weights, *transposed, bags)


def jumprelu_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, bandwidth: float, scratch_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    values, indices = _ragged.jumprelu(x, W_enc, b_enc, threshold, scratch_bytes, bandwidth)
    limit = threshold.float()[indices.clamp_min(0)] + bandwidth / 2
    return values, indices, (indices >= 0) & (values.float() < limit)


def virtual_matmul(upstream: Upstream, scratch_bytes: int) -> Tensor:
    z_values, z_indices, V, _, order, starts, _ = upstream
    return _matmul.forward(z_values, z_indices, V, order, starts, scratch_bytes=scratch_bytes)


def virtual_matmul_backward(
    grad: Tensor, upstream: Upstream, scratch_bytes: int, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    *tensors, _ = upstream
    return _matmul.backward(grad, *tensors, needed, scratch_bytes=scratch_bytes)


def connected_encode(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    scale: Tensor,
    upstream: Upstream,
    k: int,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    *tensors, _ = upstream
    return _connected.forward(r0, W_enc, b_enc, *tensors, scale, k, scratch_bytes)


def connected_encode_backward(
    grad_values: Tensor,
    values: Tensor,
    indices: Tensor,
    r0: Tensor,
    W_enc: Tensor,
    scale: Tensor,
    upstream: Upstream,
    scratch_bytes: int,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    *tensors, _, _, _ = upstream
    return _connected.backward(grad_values, values, indices, r0, W_enc, *tensors, scale, needed, scratch_bytes)


register("topk_encode", "triton", topk_encode, encode_backward)
register("batchtopk_encode", "triton", _ragged.batchtopk)
register("jumprelu_encode", "triton", jumprelu_encode)
register("sparse_decode", "triton", _decode.forward, _decode.backward)
register("transposed_gather_sum", "triton", transposed_gather_sum)
register("virtual_weights", "triton", _weights.forward, _weights.backward)
register("virtual_matmul", "triton", virtual_matmul, virtual_matmul_backward, csc=True)
register("connected_encode", "triton", connected_encode, connected_encode_backward, csc=True)
register("select_connections", "triton", _select.forward)
