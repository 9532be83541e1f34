"""The baselines: each op and each training step in plain torch, written without sparseclt's ops.

"dense" is what most codebases write. "torch" is the fastest form that plain torch has for the same function, as far
as we know. Functions of an op take its inputs as one namespace (`problems.py`); a gate compares every result with the
op's shipped reference before anything is timed.
"""

import warnings
from types import SimpleNamespace as Inputs
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Pair = tuple[Tensor, Tensor]


def dense_topk(pre: Tensor, k: int) -> Pair:
    return torch.relu(pre).topk(k, sorted=False)


def scatter(values: Tensor, indices: Tensor, columns: int) -> Tensor:
    return values.new_zeros(len(values), columns).scatter(1, indices, values)


# sparse_decode


def decode_dense(i: Inputs) -> Tensor:
    return scatter(i.values, i.indices, len(i.W_dec)) @ i.W_dec


def decode_torch(i: Inputs) -> Tensor:
    return functional.embedding_bag(i.indices, i.W_dec, per_sample_weights=i.values, mode="sum")


# topk_encode


def encode_dense(i: Inputs) -> Pair:
    return dense_topk(functional.linear(i.x, i.W_enc, i.b_enc), i.k)


def encode_gemm_topk(i: Inputs) -> Pair:
    """Without a pass of its own for relu: only the k values are clipped."""
    values, indices = functional.linear(i.x, i.W_enc, i.b_enc).topk(i.k)
    return torch.relu(values), indices


class _SparseGradients(torch.autograd.Function):
    """Tokens in chunks through one buffer; gradients over the k selected latents by embedding_bag and a CSR product."""

    @staticmethod
    def forward(ctx, x, W_enc, b_enc, k):
        N, F = len(x), len(W_enc)
        rows = max(1, min(N, (4 << 20) // (F * x.element_size())))
        buffer = x.new_empty(rows, F)
        values, indices = x.new_empty(N, k), torch.empty(N, k, dtype=torch.int64, device=x.device)
        for start in range(0, N, rows):
            part = slice(start, min(start + rows, N))
            pre = torch.addmm(b_enc, x[part], W_enc.T, out=buffer[: part.stop - start])
            torch.topk(pre, k, sorted=False, out=(values[part], indices[part]))
        values.relu_()
        ctx.save_for_backward(x, W_enc, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        x, W_enc, values, indices = ctx.saved_tensors
        (N, k), F = values.shape, len(W_enc)
        grad = grad * (values > 0)
        dx = functional.embedding_bag(indices, W_enc, per_sample_weights=grad, mode="sum")
        tokens = torch.arange(N, device=x.device).repeat_interleave(k)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta state"
            by_latent = torch.sparse_coo_tensor(torch.stack([indices.flatten(), tokens]), grad.flatten(), (F, N))
            dW = by_latent.to_sparse_csr() @ x
        db = grad.new_zeros(F).index_add_(0, indices.flatten(), grad.flatten())
        return dx, dW, db, None


def encode_torch(i: Inputs) -> Pair:
    return _SparseGradients.apply(i.x, i.W_enc, i.b_enc, i.k)


# batchtopk_encode and jumprelu_encode: latents [N, F], mostly zeros


def batchtopk_dense(i: Inputs) -> Tensor:
    flat = torch.relu(functional.linear(i.x, i.W_enc, i.b_enc)).flatten()
    values, places = flat.topk(len(i.x) * i.k, sorted=False)
    return torch.zeros_like(flat).scatter(0, places, values).view(len(i.x), -1)


class _JumpReLU(torch.autograd.Function):
    """Straight-through: the step at the threshold counts as a ramp as wide as the bandwidth."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = (pre - threshold).abs() < ctx.bandwidth / 2
        return grad * (pre > threshold), (grad * near).sum(0) * (-threshold / ctx.bandwidth), None


def jumprelu_dense(i: Inputs) -> Tensor:
    return _JumpReLU.apply(functional.linear(i.x, i.W_enc, i.b_enc), i.threshold, i.bandwidth)


# virtual weights, and their product with sparse latents


def masked_weights(i: Inputs) -> Tensor:
    """[F, U], as research code keeps them: every virtual weight times a mask of zeros and ones."""
    return (i.W_enc @ i.E.T) * i.mask


def weights_dense(i: Inputs) -> Tensor:
    filled = i.connections.indices >= 0
    return (i.W_enc @ i.E.T).gather(1, i.connections.indices.clamp_min(0)) * filled


def weights_torch(i: Inputs) -> Tensor:
    """Gathered rows, a bounded number at a time."""
    filled, conn = i.connections.indices >= 0, i.connections.indices.clamp_min(0)
    rows = max(1, (32 << 20) // (conn.shape[1] * i.E.shape[1] * i.E.element_size()))
    parts = [
        torch.bmm(functional.embedding(c, i.E), w[:, :, None])[:, :, 0]
        for w, c in zip(i.W_enc.split(rows), conn.split(rows), strict=True)
    ]
    return torch.cat(parts) * filled


def matmul_dense(i: Inputs) -> Tensor:
    """Virtual weights spelled out as a matrix [F, U], then one GEMM."""
    U = i.connections.upstream
    ids = i.connections.indices
    V = i.V.new_zeros(len(i.V), U).scatter_add(1, ids.clamp_min(0), i.V * (ids >= 0))
    return scatter(i.z_values, i.z_indices, U) @ V.T


def matmul_torch(i: Inputs) -> Tensor:
    z = scatter(i.z_values, i.z_indices, i.connections.upstream)
    ids = i.connections.indices
    V = i.V * (ids >= 0) if "V" in vars(i) else weights_torch(i)
    return functional.embedding_bag(ids.clamp_min(0), z.T.contiguous(), per_sample_weights=V, mode="sum").T


def virtual_dense(i: Inputs) -> Tensor:
    return scatter(i.z_values, i.z_indices, i.connections.upstream) @ masked_weights(i).T


def connected_dense(i: Inputs) -> Pair:
    pre = (i.r0 @ i.W_enc.T + virtual_dense(i)) / i.scale[:, None] + i.b_enc
    return dense_topk(pre, i.k)


def connected_torch(i: Inputs) -> Pair:
    pre = (i.r0 @ i.W_enc.T + matmul_torch(i)) / i.scale[:, None] + i.b_enc
    values, indices = pre.topk(i.k)
    return torch.relu(values), indices


def select_dense(i: Inputs) -> Tensor:
    return (i.importance * (i.W_enc @ i.E.T).abs()).topk(i.C).indices


def select_torch(i: Inputs) -> Tensor:
    F, U = len(i.W_enc), len(i.E)
    rows = max(1, min(F, (32 << 20) // (U * i.E.element_size())))
    buffer, chosen = i.E.new_empty(rows, U), []
    for part in i.W_enc.split(rows):
        scores = torch.mm(part, i.E.T, out=buffer[: len(part)]).abs_().mul_(i.importance)
        chosen.append(scores.topk(i.C).indices)
    return torch.cat(chosen)


# A whole training step on the parameters of a SparseCLT. `i` holds clt, activations, k and masks.


def _fvu(y: Tensor, reconstruction: Tensor) -> Tensor:
    return (y - reconstruction).square().sum() / (y - y.mean(0)).square().sum()


def _centre(rows: Tensor) -> Tensor:
    return rows - rows.mean(1, keepdim=True)


def _dense_latents(pre: Tensor, k: int) -> Tensor:
    return scatter(*dense_topk(pre, k), pre.shape[1])


def _decode_step(z: Pair | Tensor, W_dec: Tensor) -> Tensor:
    """[N, T, D] to all targets at once: one large GEMM, or one gather."""
    flat = W_dec.flatten(1)
    if isinstance(z, Tensor):
        return (z @ flat).unflatten(1, W_dec.shape[1:])
    return functional.embedding_bag(z[1], flat, per_sample_weights=z[0], mode="sum").unflatten(1, W_dec.shape[1:])


def vanilla(i: Inputs, sparse_decoder: bool = False) -> tuple[list[Any], Tensor]:
    """Latents of every layer, as a matrix [N, F] (`sparse_decoder`: as pairs), and the sum of FVUs."""
    written: list[Tensor | float] = [0.0] * i.layers
    latents: list[Any] = []
    for layer, m in enumerate(i.clt):
        pre = functional.linear(i.activations.x[layer].flatten(0, 1), m.W_enc, m.b_enc)
        z = dense_topk(pre, i.k) if sparse_decoder else _dense_latents(pre, i.k)
        latents.append(z)
        for target, part in enumerate(_decode_step(z, m.W_dec).unbind(1)):
            written[layer + target] = written[layer + target] + part
    return latents, sum_of_fvu(i, written)


def sum_of_fvu(i: Inputs, written: list) -> Tensor:
    pairs = zip(i.activations.mlp_out, written, i.clt, strict=True)
    return torch.stack([_fvu(y.flatten(0, 1), part + m.b_dec) for y, part, m in pairs]).sum()


def connected(i: Inputs, masks: list[Any] | None) -> tuple[list[Tensor], Tensor]:
    """Sparsely-connected mode with dense F x U virtual weights times `masks` (tensors or numbers).

    None: the same encode without a mask. It needs no virtual weights, since it reads the reconstructions of upstream
    modules from the residual stream."""
    a = i.activations
    latents: list[Tensor] = []
    written: list[Tensor | float] = [0.0] * i.layers
    stream = a.r_0.flatten(0, 1)  # embedding, frozen attention outputs, biases; unmasked: reconstructions too
    for layer, m in enumerate(i.clt):
        stream = stream + a.attn_out[layer].flatten(0, 1)
        rows = _centre(m.W_enc)
        pre = stream @ rows.T
        if masks is not None and layer:
            E = torch.cat([up.W_dec[:, : layer - u].sum(1) for u, up in zip(range(layer), i.clt, strict=False)])
            pre = pre + torch.cat(latents, 1) @ ((rows @ E.T) * masks[layer]).T
        pre = pre / a.scale[layer].flatten()[:, None] + m.b_enc
        latents.append(_dense_latents(pre, i.k))
        for target, part in enumerate(_decode_step(latents[-1], m.W_dec).unbind(1)):
            written[layer + target] = written[layer + target] + part
        stream = stream + m.b_dec + (written[layer] if masks is None else 0.0)
    return latents, sum_of_fvu(i, written)


def loss(i: Inputs, mode: str, sparse_decoder: bool = False) -> Tensor:
    """The Trainer's loss: vanilla FVUs; in "both" and "residual" also those of the other mode, and the FVU of its
    latents against the vanilla ones."""
    target, total = vanilla(i, sparse_decoder)
    if mode == "vanilla":
        return total
    latents, fvus = connected(i, i.masks if mode == "both" else None)
    agreement = torch.stack([_fvu(t, z) for z, t in zip(latents, target, strict=True)]).sum()
    return total + fvus + i.agreement_weight * agreement


def encode_floor(i: Inputs) -> None:
    """Only the encode GEMMs of a vanilla step, into memory that is allocated already."""
    with torch.no_grad():
        for x, m in zip(i.activations.x, i.clt, strict=True):
            torch.addmm(m.b_enc, x.flatten(0, 1), m.W_enc.T, out=i.pre_activations)
