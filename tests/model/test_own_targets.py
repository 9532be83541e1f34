"""Per-layer transcoders: a CLT whose latents write to their own layer only is one with zeros for the later layers."""

from dataclasses import replace

import pytest
import torch
from clts import F, connect_random, language_model, random_clt, tokens

from sparseclt.config import CLTConfig, ConnectionConfig, DataConfig, LoggingConfig, TrainConfig
from sparseclt.model.clt import SparseCLT
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.sites import MODES
from sparseclt.training.loggers import read_metrics
from sparseclt.training.trainer import Trainer


@pytest.fixture(scope="module", params=["gpt2", "pythia"])
def pair(request):
    """A model, a CLT with targets "own", and the same one with zero decoders for the later layers."""
    model = language_model(request.param)
    zeros = random_clt(model)
    own = SparseCLT(replace(zeros.architecture, targets="own")).double()
    with torch.no_grad():
        for a, b in zip(own, zeros, strict=True):
            b.W_dec[:, 1:] = 0
            for name in ("W_enc", "b_enc", "b_dec"):
                getattr(a, name).copy_(getattr(b, name))
            a.W_dec.copy_(b.W_dec[:, :1])
    for clt in (own, zeros):
        connect_random(clt, 6)
    return model, own, zeros


def test_both_modes_agree_with_the_clt_that_holds_zeros(pair):
    model, own, zeros = pair
    assert [module.W_dec.shape[1] for module in own] == [1, 1, 1]
    activations = model.capture(tokens())
    for mode in MODES:
        a, b = own(activations, mode), zeros(activations, mode)
        for site in own.sites:
            torch.testing.assert_close(a.output(site), b.output(site), rtol=0, atol=1e-12)


def test_gradients_agree_with_those_of_the_clt_that_holds_zeros(pair):
    model, own, zeros = pair
    activations = model.capture(tokens())
    found = []
    for clt in (own, zeros):
        notes = DecoderGradients(clt)
        clt.zero_grad()
        forward = clt(activations, "sparse", gradients=notes)
        sum(forward.output(site).square().sum() for site in clt.sites).backward()
        notes.add_to_encoders()
        decoders = [torch.cat([chunk.gradient for chunk in notes.chunks(i)])[:, 0] for i in range(len(clt.sites))]
        found.append([*decoders, *(module.W_enc.grad for module in clt)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    plain = own(activations, "sparse")
    own.zero_grad()
    sum(plain.output(site).square().sum() for site in own.sites).backward()
    for i, module in enumerate(own):
        torch.testing.assert_close(module.W_dec.grad[:, 0], found[0][i], rtol=0, atol=1e-10)


def test_they_are_saved_and_read_back_without_the_zeros(pair, tmp_path):
    _, own, _ = pair
    loaded = SparseCLT.from_pretrained(own.save_pretrained(tmp_path / "clt"))
    assert loaded.architecture == own.architecture and loaded.transcoder(0).W_dec.shape == (F, 1, 32)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in own.state_dict().items())
    assert not (tmp_path / "clt" / "config.yaml").exists()


def test_they_are_trained_and_written_like_any_other(tmp_path):
    config = TrainConfig(
        out=str(tmp_path / "run"), steps=30, batch_rows=4, clt=CLTConfig(latents=32, active=4, targets="own"),
        connections=ConnectionConfig(per_latent=3), data=DataConfig(row_tokens=12), device="cpu",
        logging=LoggingConfig(every_steps=1, progress=False),
    )  # fmt: skip
    clt = Trainer(config, language_model=language_model("gpt2", torch.float32), rows=tokens(40, 12)).fit()
    assert {module.W_dec.shape[1] for module in clt} == {1} and clt.connected
    read = SparseCLT.from_pretrained(tmp_path / "run" / "clt")
    assert read.architecture.targets == "own" and torch.equal(read.transcoder(0).W_dec, clt.transcoder(0).W_dec)
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["fvu_vanilla"] < 0.9 * metrics[0]["fvu_vanilla"]
    assert "fvu_sparse" in metrics[-1]
