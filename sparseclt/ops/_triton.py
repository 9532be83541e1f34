"""The triton backend: launchers of csrc_triton behind the ops. Imported when first asked for; needs triton."""

from torch import Tensor

from csrc_triton import (
    batchtopk_encode,
    jumprelu_encode,
    rows,
    select_connections,
    sparse_decode,
    topk_encode,
    virtual_weights,
)
from csrc_triton import connected_encode as _connected
from csrc_triton import virtual_matmul as _matmul
from sparseclt.ops._rows import Transpose
from sparseclt.ops.backend import register
from sparseclt.ops.virtual_matmul import Upstream


def transposed_gather_sum(weights: Tensor, transposed: Transpose, bags: Tensor) -> Tensor:
    return rows.transposed_gather_sum(weights, *transposed, bags)


def _arguments(upstream: Upstream) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    return *upstream[:4], *upstream.csc, upstream.size


def virtual_matmul(upstream: Upstream, scratch_bytes: int) -> Tensor:
    return _matmul.forward(*_arguments(upstream), scratch_bytes)


def virtual_matmul_backward(
    grad: Tensor, upstream: Upstream, scratch_bytes: int, needed: list[bool]
) -> tuple[Tensor | None, Tensor | None]:
    return _matmul.backward(grad, *_arguments(upstream), scratch_bytes, needed)


def connected_encode(
    r0: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    scale: Tensor,
    upstream: Upstream,
    k: int,
    scratch_bytes: int,
) -> tuple[Tensor, Tensor]:
    return _connected.forward(r0, W_enc, b_enc, *_arguments(upstream), scale, k, scratch_bytes)


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
    return _connected.backward(
        grad_values, values, indices, r0, W_enc, *_arguments(upstream), scale, scratch_bytes, needed
    )


register("topk_encode", "triton", topk_encode.forward, topk_encode.backward)
register("batchtopk_encode", "triton", batchtopk_encode.forward)
register("jumprelu_encode", "triton", jumprelu_encode.forward)
register("sparse_decode", "triton", sparse_decode.forward, sparse_decode.backward)
register("transposed_gather_sum", "triton", transposed_gather_sum)
register("virtual_weights", "triton", virtual_weights.forward, virtual_weights.backward)
register("virtual_matmul", "triton", virtual_matmul, virtual_matmul_backward, csc=True)
register("connected_encode", "triton", connected_encode, connected_encode_backward, csc=True)
register("select_connections", "triton", select_connections.forward)
