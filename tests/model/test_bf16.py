"""Virtual weights in bf16: through many layers, and with learned connections in fp32."""

import pytest
import torch
from clts import language_model
from tiny_models import tokens

from sparseclt.config import CLTConfig, ConnectionConfig, DataConfig, LoggingConfig, LossConfig, TrainConfig
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.shape import Architecture, ModelShape
from sparseclt.model.sites import MODES
from sparseclt.model.transcoders import Transcoders
from sparseclt.training.trainer import Trainer


def deep_clt(layers: int = 26, F: int = 8, D: int = 16, C: int = 12) -> Transcoders:
    """Random weights that bf16 represents exactly, and C random connections per latent."""
    torch.manual_seed(0)
    clt = Transcoders(Architecture(ModelShape(layers=layers, d_model=D), F, 2))
    with torch.no_grad():
        for module in clt:
            module.W_dec.normal_()
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
            if module.upstream:
                module.connect(torch.rand(F, module.upstream).argsort(1)[:, :C])
    return clt


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


def by_autograd(clt: Transcoders, dV: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    V = clt.virtual_weights()
    torch.autograd.backward([V[i] for i in dV], [grad.to(V[i].dtype) for i, grad in dV.items()])
    return {name: parameter.grad for name, parameter in clt.named_parameters() if parameter.grad is not None}


def noted(clt: Transcoders, dV: dict[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    gradients = DecoderGradients(clt)
    V = gradients.virtual_weights()
    torch.autograd.backward([V[i] for i in dV], [grad.to(V[i].dtype) for i, grad in dV.items()])
    gradients.add_to_encoders()
    found = {name: parameter.grad for name, parameter in clt.named_parameters() if parameter.grad is not None}
    for i in range(len(clt.sites)):
        found[f"transcoders.{i}.W_dec"] = torch.cat([chunk.gradient for chunk in gradients.chunks(i)])
    return found


@pytest.mark.parametrize("path", [by_autograd, noted])
def test_gradients_through_26_layers_of_bf16_decoders_are_those_of_fp32_to_half_a_per_cent(path):
    torch.manual_seed(1)
    dV = {r.index: torch.randn(r.connections.indices.shape).bfloat16() for r in deep_clt().readers() if r.connections}
    truth, got = path(deep_clt(), dV), path(deep_clt().bfloat16(), dV)
    assert truth.keys() == got.keys() and any("W_dec" in name for name in got)
    for name, expected in truth.items():
        if expected.any():
            assert relative_error(got[name], expected) < 0.005, name


def test_virtual_weights_in_bf16_are_those_of_fp32_up_to_rounding():
    for got, truth in zip(deep_clt().bfloat16().virtual_weights(), deep_clt().virtual_weights(), strict=True):
        assert got is None or got.dtype == torch.bfloat16 and relative_error(got, truth) < 0.005


def learned(tmp_path, dtype: str) -> Trainer:
    config = TrainConfig(
        out=str(tmp_path), batch_rows=3, steps=60, data=DataConfig(row_tokens=12), device="cpu",
        clt=CLTConfig(latents=24, active=4, dtype=dtype), logging=LoggingConfig(progress=False),
        connections=ConnectionConfig(policy="learned", per_latent=9, candidates_after_steps=2),
        loss=LossConfig(sparse_start_share=0.0, sparse_ramp_share=0.0),
    )  # fmt: skip
    return Trainer(config, language_model=language_model("gpt2", torch.float32), rows=tokens(30, 12))


def test_learned_connections_train_in_bf16(tmp_path):
    t = learned(tmp_path, "bf16")
    activations = t.batches.capture(next(t.batches.stream_at(0)))
    metrics = [t.train_step(activations) for _ in range(25)]
    for mode in MODES:
        assert metrics[-1][f"fvu_{mode}"] < 0.9 * metrics[3][f"fvu_{mode}"], mode
    assert all(module.logits.dtype == torch.float32 for module in t.clt if module.upstream)


def test_gates_in_fp32_of_virtual_weights_in_bf16_get_their_gradient_and_pass_it_on():
    clt = deep_clt(layers=4).bfloat16()
    for module in clt:
        if module.upstream:
            module.logits = torch.nn.Parameter(torch.randn(module.connection_indices.shape))
    V = [None if v is None else v.detach().requires_grad_() for v in clt.unmasked_virtual_weights()]
    for module, free, gated in zip(clt, V, clt.masked(V), strict=True):
        if free is None:
            continue
        gate = (module.logits > 0).float()
        assert gated.dtype == torch.bfloat16 and torch.equal(gated, (free * gate).bfloat16())
        grad = torch.randn(gated.shape).bfloat16()
        gated.backward(grad)
        assert relative_error(free.grad, grad * gate) < 0.004
        p = torch.sigmoid(module.logits)
        assert relative_error(module.logits.grad, grad.double() * free * p * (1 - p)) < 1e-5
