"""Latents that are dead in either mode get a higher bias until they fire."""

import pytest
import torch
from clts import language_model, tokens

from sparseclt.config import (
    CLTConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from sparseclt.model.sites import Site
from sparseclt.training.revival import dead_after_tokens, to_revive
from sparseclt.training.trainer import Trainer

ROWS, LENGTH = 4, 12


def trainer(tmp_path, steps=40, **optimizer) -> Trainer:
    config = TrainConfig(
        out=str(tmp_path), batch_rows=ROWS, steps=steps, data=DataConfig(row_tokens=LENGTH),
        clt=CLTConfig(latents=48, active=3), connections=ConnectionConfig(per_latent=5, refresh_steps=5),
        loss=LossConfig(sparse_start_share=0.0), logging=LoggingConfig(progress=False),
        optimizer=OptimizerConfig(**optimizer),
    )  # fmt: skip
    return Trainer(config, language_model=language_model("gpt2", torch.float32), rows=tokens(40 * ROWS, LENGTH))


@pytest.mark.parametrize("mode", ["vanilla", "sparse"])
def test_the_bias_of_a_dead_latent_rises_and_no_other(tmp_path, mode):
    still, rising = (trainer(tmp_path, revival_rate=rate, dead_after_tokens=500) for rate in (0.0, 7.0))
    batch = next(still.batches.from_step(0))
    for t in (still, rising):
        t.train_step(batch)
        t.activity[mode].tokens_since_fired[2, [3, 5]] = 10**6
        t.train_step(batch)
    fired = (rising.activity[mode].tokens_since_fired[2] == 0) | (rising.activity[mode].tokens_since_fired[2] < 500)
    moved = rising.clt.transcoder(2).b_enc - still.clt.transcoder(2).b_enc
    expected = torch.where(fired, 0.0, 7.0 * rising.config.optimizer.learning_rate)
    assert (expected > 0).any()
    torch.testing.assert_close(moved.detach(), expected)
    assert torch.equal(rising.clt.transcoder(1).b_enc, still.clt.transcoder(1).b_enc)


def test_fewer_latents_stay_silent(tmp_path):
    def silent(rate: float) -> float:
        t = trainer(tmp_path, steps=120, revival_rate=rate, dead_after_tokens=300)
        for activations in t.batches.from_step(0):
            metrics = t.train_step(activations)
        return metrics["dead_vanilla"]

    with_it, without = silent(10.0), silent(0.0)
    assert without > 0.2 and with_it < without / 2, (with_it, without)


def test_by_default_a_latent_is_dead_after_110_times_the_tokens_between_two_firings(tmp_path):
    t = trainer(tmp_path)
    K = [t.clt.architecture.active_of(site.layer) for site in t.clt.sites]
    assert dead_after_tokens(OptimizerConfig(), t.clt).flatten().tolist() == [110 * 48 // k for k in K]
    assert (dead_after_tokens(OptimizerConfig(dead_after_tokens=7), t.clt) == 7).all()


def test_attention_latents_rise_for_vanilla_mode_only():
    sites = [Site("attn", 0), Site("mlp", 0)]
    dead = {"vanilla": torch.tensor([[True, False], [False, False]]), "sparse": torch.tensor([[False, True]] * 2)}
    assert to_revive(dead, sites).tolist() == [[True, False], [False, True]]
    assert to_revive({"vanilla": dead["vanilla"]}, sites).tolist() == dead["vanilla"].tolist()
