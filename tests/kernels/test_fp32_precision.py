"""fp32 inputs keep fp32 accuracy on tensor cores; TF32 and IEEE by torch's own setting."""

from dataclasses import replace

import pytest
import torch
from split_products import product

from csrc_triton import scores
from csrc_triton.topk_encode import forward

DEFAULT = scores.FLOAT32["tf32x3"]


def error(got, a, b):
    return (got.double() - a.double() @ b.double().T).abs()


@pytest.mark.parametrize("D", [768, 2304])
def test_the_default_errs_at_most_twice_as_much_as_torch(D):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, D, generator=generator), torch.randn(40, D, generator=generator) / D**0.5
    torchs = error(a @ b.T, a, b)
    ours = error(product(a, b, DEFAULT.precision, DEFAULT.run * DEFAULT.depth), a, b)
    assert ours.max() <= 2 * torchs.max() and ours.mean() <= 2 * torchs.mean()
    one_sum, tf32 = (error(product(a, b, name, D), a, b) for name in ("tf32x3", "tf32"))
    assert one_sum.mean() > ours.mean() and tf32.mean() > 100 * torchs.mean()


def test_torchs_setting_decides(monkeypatch):
    matmul = torch.backends.cuda.matmul
    assert scores.fp32_precision() == "tf32x3"
    for asked in ("ieee", "tf32"):
        with monkeypatch.context() as patch:
            patch.setattr(scores.torch.backends.cuda, "matmul", Setting(asked, False))
            assert scores.fp32_precision() == asked
    for setting, precision in ((Setting("none", True), "tf32"), (Setting("none", False), "tf32x3")):
        with monkeypatch.context() as patch:
            patch.setattr(scores.torch.backends.cuda, "matmul", setting)
            assert scores.fp32_precision() == precision
    with monkeypatch.context() as patch:
        patch.setattr(scores.torch.version, "hip", "6.0")
        assert scores.fp32_precision() == "ieee"
    assert torch.backends.cuda.matmul is matmul


class Setting:
    def __init__(self, fp32_precision, allow_tf32):
        self.fp32_precision, self.allow_tf32 = fp32_precision, allow_tf32


@pytest.mark.parametrize("D", [256, 600])
def test_sums_in_runs_are_whole(D, monkeypatch):
    monkeypatch.setitem(scores.FLOAT32, "tf32x3", replace(DEFAULT, run=2))  # runs of 64, and a rest
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, W = torch.randn(3, D, device=device), torch.randn(20, D, device=device)
    values, _ = forward(x, W, None, 4, "topk", 1 << 20)
    torch.testing.assert_close(values, (x @ W.T).relu().topk(4).values, rtol=1e-5, atol=1e-4)
