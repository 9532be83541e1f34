"""Launches of an optimiser step at the size of Gemma-2 2B with F 65,536, counted without running anything."""

from dataclasses import replace

import torch
from launches import counted

from sparseclt import ops
from sparseclt.config import OptimizerConfig
from sparseclt.model.clt import SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.shape import Architecture, ModelShape
from sparseclt.ops import backend
from sparseclt.ops.optimizer_step import Written
from sparseclt.training.optimizer import RowAdam
from sparseclt.training.update import clip_and_step

L, N, D, F, K, C = 26, 8192, 2304, 65_536, 64, 64
GPU_BYTES = 141 << 30


def unchecked(indices: torch.Tensor, upstream: int) -> ops.Connections:
    """Connections whose ids nobody reads: they have no data."""
    connections = object.__new__(ops.Connections)
    for name, value in (("indices", indices), ("upstream", upstream)):
        object.__setattr__(connections, name, value)
    return connections


def test_at_most_2000(monkeypatch):
    triton = backend.OPTIONAL["triton"]
    monkeypatch.setitem(backend.OPTIONAL, "triton", replace(triton, devices=("meta",)))
    monkeypatch.setattr("sparseclt.devices.Budget.on", lambda budget, device: int(budget.gpu_share * GPU_BYTES))
    with torch.device("meta"):
        clt = SparseCLT(Architecture(ModelShape(layers=L, d_model=D), F, K))
        optimizer = RowAdam(clt, OptimizerConfig())
        for module in clt:
            if module.upstream:
                module.connections = unchecked(torch.empty(F, C, dtype=torch.int32), module.upstream)
                module.connections.transposed  # noqa: B018  (sorted once, not in every step)
        gradients = DecoderGradients(clt, "triton")
        targets = [torch.empty(N, D) for _ in range(L)]
        for index, module in enumerate(clt):
            for _ in range(2):
                ids = torch.empty(N, K, dtype=torch.int64)
                gradients.written[index].append(Written(torch.empty(N, K), ids, tuple(targets[index:])))
            if module.upstream:
                gradients.read[index] = torch.empty(F, C)
            for parameter in (module.W_enc, module.b_enc, module.b_dec):
                parameter.grad = torch.empty_like(parameter)
        with counted() as launches:
            clip_and_step(clt, gradients, optimizer, 1e-3, 1.0, lambda norm: 2.0)
    assert launches["decoder_gradient_kernel"] > 2 * L
    assert 500 < launches.total() <= 2000, launches
