"""A run that goes wrong says so, once, and a good one says nothing."""

import warnings

import pytest
from clts import language_model, tokens

from sparseclt.config import (
    CLTConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainConfig,
)
from sparseclt.training.trainer import Trainer
from sparseclt.training.warning_signs import TrainingWarning, WarningSigns

STEPS = 200


def metrics(fvu=0.1, excess=0.05, dead=0.01):
    return {
        "fvu_vanilla": fvu, "fvu_sparse": fvu + excess, "dead_vanilla": dead, "dead_sparse": 0.0,
        "fvu_vanilla/mlp_0": fvu, "fvu_sparse/mlp_0": fvu + excess,
    }  # fmt: skip


def said(of_step):
    signs = WarningSigns(TrainConfig(steps=STEPS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, STEPS + 1):
            signs.look(step, of_step(step))
    assert all(w.category is TrainingWarning for w in caught)
    return [str(w.message) for w in caught]


def test_a_good_run_says_nothing():
    assert said(lambda step: metrics(1 / step**0.5, 0.5 / step**0.5, 1 / step)) == []


def test_a_share_of_dead_latents_that_stays_says_nothing():
    assert said(lambda step: metrics(dead=0.33 + step * 1e-5)) == []


def test_a_spike_says_nothing():
    assert said(lambda step: metrics(fvu=0.4 if step == 120 else 0.1)) == []


@pytest.mark.parametrize(
    ("late", "message"),
    [
        (metrics(fvu=0.3, excess=-0.15), "FVU in vanilla mode has risen to"),
        (metrics(excess=0.1), "excess FVU of sparsely-connected mode has risen to"),
        (metrics(dead=0.25), "25% of the latents are dead in vanilla mode, 1% were 20 steps before"),
    ],
)
def test_what_goes_wrong_is_said_once_with_advice(late, message):
    (text,) = said(lambda step: metrics() if step < 120 else late)
    assert message in text and "try a lower optimizer.learning_rate" in text


def test_a_site_worse_than_its_mean_is_named():
    (text,) = said(lambda step: metrics() | {"fvu_sparse/mlp_0": 3.0})
    assert "mlp_0 is not reconstructed in sparsely-connected mode (FVU 3" in text


def test_a_real_run_with_far_too_large_steps_warns(tmp_path):
    config = TrainConfig(
        out=str(tmp_path / "run"), batch_rows=4, steps=80, data=DataConfig(row_tokens=12),
        clt=CLTConfig(latents=48, active=3), connections=ConnectionConfig(policy="none"),
        optimizer=OptimizerConfig(learning_rate=0.3, clip_norm=None), logging=LoggingConfig(progress=False),
    )  # fmt: skip
    with pytest.warns(TrainingWarning, match="try a lower optimizer.learning_rate"):
        Trainer(config, language_model=language_model("gpt2"), rows=tokens(320, 12)).fit()
