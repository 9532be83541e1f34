"""Biases and scales in float32 beside bf16 weights: they are added to float32 sums, and never rounded."""

import pytest
import torch
from op_helpers import COMPILED, DEVICE, ids, rows

from sparseclt import ops

N, D, F, K, C, U = 10, 16, 40, 4, 3, 24
BACKENDS = ["torch", *COMPILED]


def halves(*shape: int, seed: int) -> torch.Tensor:
    return rows(*shape, seed=seed).bfloat16().requires_grad_()


def connected(x, W_enc, b_enc, scale, backend=None):
    z = rows(N, 5, seed=4).abs(), ids(N, 5, count=U, seed=5)
    connections = torch.stack([torch.randperm(U, generator=torch.Generator().manual_seed(f))[:C] for f in range(F)])
    like = (tensor.to(x.dtype) for tensor in (z[0], rows(F, C, seed=6)))
    values, V = next(like), next(like)
    return ops.connected_encode(
        x, W_enc, b_enc, values, z[1], V, connections.to(DEVICE), scale, K, upstream=U, backend=backend
    )


def encoded(x, W_enc, b_enc, scale, backend=None):
    return ops.topk_encode(x, W_enc, b_enc, K, backend=backend)


@pytest.mark.parametrize("op", [encoded, connected])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_biases_and_scales_are_not_rounded(op, backend):
    x, W_enc = halves(N, D, seed=0), halves(F, D, seed=1)
    # Biases that bf16 cannot tell apart decide which latents are the strongest.
    b_enc = (1000 + torch.arange(F, device=DEVICE) * 2.0**-6).requires_grad_()
    x.data.mul_(2.0**-16)
    scale = 1 + 2.0**-10 * torch.arange(N, device=DEVICE)
    values, indices = op(x, W_enc, b_enc, scale, backend)
    if op is encoded:
        assert indices.tolist() == [list(range(F - 1, F - 1 - K, -1))] * N
    truth = op(*(t.detach().double() for t in (x, W_enc, b_enc, scale)), "reference")
    assert values.dtype == torch.bfloat16 and torch.equal(indices, truth[1])
    torch.testing.assert_close(values.double(), truth[0], rtol=2.0**-7, atol=0)  # the interpreter truncates
    gradients = torch.autograd.grad(values.float().sum(), (x, W_enc, b_enc))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert torch.equal(gradients[2], torch.bincount(indices.flatten(), minlength=F).float())


@pytest.mark.parametrize("op", [encoded, connected])
def test_other_dtypes_are_refused(op):
    x, W_enc, b_enc, scale = halves(N, D, seed=0), halves(F, D, seed=1), rows(F), 1 + rows(N).abs()
    with pytest.raises(TypeError, match="b_enc: expected torch.bfloat16, the dtype of (x|r0), got torch.float64"):
        op(x, W_enc, b_enc, scale.float())
    with pytest.raises(TypeError, match="b_enc: expected torch.float32, the dtype of (x|r0), got torch.bfloat16"):
        op(x.float(), W_enc.float(), b_enc.bfloat16(), scale.float())
