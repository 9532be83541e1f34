"""On the triton backend one kernel computes the gradient of some decoder rows: the same as the torch backend's."""

import os

import pytest
import torch
from steps import make_activations, make_trainer

from sparseclt.model.decoder_gradients import DecoderGradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU or the interpreter"
)
SIZES = {"L": 3, "D": 8, "F": 12, "K": 2, "C": 3, "N": 6}


def test_rows_squares_and_touched_equal_those_of_the_torch_backend():
    trainer, activations = make_trainer("both", DEVICE, **SIZES), make_activations(device=DEVICE, **SIZES)
    by_backend = {}
    for backend in ("torch", "triton"):
        gradients = DecoderGradients(trainer.clt, "torch", chunk_bytes=5 * 3 * SIZES["D"] * 4)
        trainer.clt.zero_grad()
        trainer.loss(activations, 5, gradients)[0].backward()
        gradients.backend = backend
        by_backend[backend] = gradients
    for index in range(SIZES["L"]):
        results = []
        for backend, gradients in by_backend.items():
            assert (gradients._kernel(index) is not None) == (backend == "triton")
            chunks = list(gradients.chunks(index))
            assert len(chunks) > 1 or index > 0
            parts = torch.cat([c.gradient for c in chunks]), torch.cat([c.touched for c in chunks])
            results.append((*parts, gradients.squares(index)))
        (expected, expected_touched, _), (got, touched, squares) = results
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(squares, expected.square().sum((0, 2)), rtol=1e-5, atol=1e-7)
        assert torch.equal(touched, expected_touched) and touched.any()
