"""Decoder gradients gathered in sparse form, a chunk of rows at a time, against autograd's."""

import gc
import weakref

import pytest
import torch
from clts import language_model
from tiny_models import tokens
from waits import Waits

from sparseclt.config import CLTConfig, ConnectionConfig, DataConfig, LoggingConfig, LossConfig, TrainConfig
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.sections import cut
from sparseclt.ops.rows import transpose
from sparseclt.training.optimizer import RowAdam
from sparseclt.training.trainer import Trainer

ROWS, LENGTH = 3, 12


def trainer(tmp_path, kind="gpt2", attention="frozen", policy="top", **more) -> Trainer:
    config = TrainConfig(
        out=str(tmp_path), batch_rows=ROWS, steps=10, data=DataConfig(row_tokens=LENGTH),
        clt=CLTConfig(latents=37, active=4, attention=attention),
        connections=ConnectionConfig(policy=policy, per_latent=5, refresh_steps=2, candidates_after_steps=2),
        logging=LoggingConfig(progress=False),
        loss=LossConfig(sparse_start_share=0.0, sparse_ramp_share=0.0), **more,
    )  # fmt: skip
    model = language_model(kind, torch.float64)
    t = Trainer(config, language_model=model, rows=tokens(ROWS, LENGTH))
    t.clt.double()
    t.optimizer = RowAdam(t.clt, config.optimizer)
    return t


def warmed_up(t: Trainer):
    """Weights and connections after some steps, and a batch."""
    activations = t.batches.capture(next(t.batches.stream_at(t.step)))
    for _ in range(4):
        t.train_step(activations)
    return activations


@pytest.mark.parametrize("kind", ["gpt2", "pythia"])
@pytest.mark.parametrize("attention", ["frozen", "latents"])
@pytest.mark.parametrize("policy", ["top", "learned", "none"])
def test_chunks_are_the_rows_of_autograds_gradient(tmp_path, kind, attention, policy):
    t = trainer(tmp_path, kind, attention, policy)
    activations = warmed_up(t)
    t.clt.zero_grad()
    expected = dict(zip([n for n, _ in t.clt.named_parameters()], torch.autograd.grad(
        t.loss(activations, 5)[0], list(t.clt.parameters()), allow_unused=True), strict=True))  # fmt: skip
    gradients = DecoderGradients(t.clt, chunk_bytes=11 * t.clt.transcoder(0).W_dec[0].numel() * 4)
    t.loss(activations, 5, gradients)[0].backward()
    gradients.add_to_encoders()
    for name, parameter in t.clt.named_parameters():
        if not name.endswith("W_dec"):
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-13)
    for index, module in enumerate(t.clt):
        assert module.W_dec.grad is None
        chunks = list(gradients.chunks(index))
        assert len(chunks) > 1
        whole = torch.cat([chunk.gradient for chunk in chunks])
        truth = expected[f"transcoders.{index}.W_dec"]
        torch.testing.assert_close(whole, truth, rtol=1e-10, atol=1e-13)
        touched = torch.cat([chunk.touched for chunk in chunks])
        assert not truth[~touched].any()
    assert any(g is not None and g.any() for n, g in expected.items() if n.endswith("W_dec"))


def test_passes_over_parts_of_a_batch_add_up(tmp_path):
    t = trainer(tmp_path)
    activations = warmed_up(t)
    once, twice = DecoderGradients(t.clt), DecoderGradients(t.clt)
    t.clt.zero_grad()
    t.loss(activations, 5, once)[0].backward()
    for _ in range(2):
        (t.loss(activations, 5, twice)[0] / 2).backward()
    for index in range(len(t.clt.sites)):
        for one, two in zip(once.chunks(index), twice.chunks(index), strict=True):
            torch.testing.assert_close(one.gradient, two.gradient, rtol=1e-10, atol=1e-13)


def test_sections_of_transposes_name_their_rows_only_and_are_cut_with_one_wait():
    indices = torch.tensor([[3, -1], [0, 3], [2, 5], [-1, 3]])
    whole = transpose(indices, 6)
    for first, rows, size in ((0, 6, 6), (2, 4, 2), (1, 5, 2), (0, 6, 1), (4, 1, 3)):
        with Waits() as waits:
            cuts = cut([whole, whole], [first, 0], rows, size)
        assert waits.by_module == {"sparseclt.model.sections": 1}
        for start, parts in zip((first, 0), cuts, strict=True):
            assert len(parts) == -(-rows // size)
            for row in range(rows):
                part, at = parts[row // size], row % size
                bounds = part.bounds()
                slots = part.order[bounds[at] : bounds[at + 1]]
                assert slots.tolist() == (indices.flatten() == start + row).nonzero().flatten().tolist()


def test_a_step_leaves_nothing_behind(tmp_path):
    t = trainer(tmp_path)
    activations = warmed_up(t)
    gradients = DecoderGradients(t.clt)
    t.loss(activations, 5, gradients)[0].backward()
    left = weakref.ref(gradients)
    del gradients
    gc.collect()
    assert left() is None
