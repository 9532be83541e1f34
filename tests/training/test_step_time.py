"""The time of a step by count."""

from dataclasses import replace

import pytest

from sparseclt.config import CLTConfig, ConnectionConfig, ParallelConfig, TrainConfig
from sparseclt.costs import Rates, Widths, sparse_decode, topk_encode, total
from sparseclt.model.shape import ModelShape, active_by_layer
from sparseclt.training import step_time
from sparseclt.training.run_sizes import RunSizes

SHAPE = ModelShape(layers=4, d_model=256, heads=4, vocab=1000, parameters=10_000_000)
CONFIG = TrainConfig(batch_rows=8, device="cpu", clt=CLTConfig(latents=4096, active=16))
RATES = Rates(tflops=100.0, memory=1000.0, link=10.0)


def on(latents: int, data: int = 1, **changes) -> TrainConfig:
    return replace(CONFIG, parallel=ParallelConfig(latents=latents, data=data), **changes)


def test_a_vanilla_step_costs_its_encoders_and_decoders():
    config = on(1, connections=ConnectionConfig("none"))
    found, N, F = step_time.step_costs(RunSizes(config, SHAPE)), 8 * 128, 4096
    Ks = active_by_layer(16, 2.0, 4, F)
    encoders = total(cost for K in Ks for cost in topk_encode(Widths(), N, 256, F, K).values())
    decoders = total(
        cost for layer, K in enumerate(Ks) for cost in sparse_decode(Widths(), N, 256, F, K, 4 - layer).values()
    )
    assert found["encoders"] == encoders and found["decoders"] == decoders
    assert not found["virtual weights"].flops and not found[step_time.CHOICE].flops


def test_ranks_share_the_computing_and_send():
    one, two = (step_time.step_time(on(n), SHAPE, RATES) for n in (1, 2))
    for name in ("encoders", "decoders", "virtual weights", "Adam", step_time.CHOICE):
        assert two.computing[name] == pytest.approx(one.computing[name] / 2, rel=0.1)
    assert one.sending == 0 and two.sending > 0
    assert two.step == pytest.approx(sum(two.computing.values()) + two.sending + two.language_model)


def test_a_model_on_a_device_of_its_own_runs_beside_the_step():
    beside = replace(CONFIG, parallel=ParallelConfig(latents=2, data=1, model_devices=("cuda:7",)))
    with_it, without = (step_time.step_time(config, SHAPE, RATES) for config in (on(2), beside))
    assert with_it.step - without.step == pytest.approx(with_it.language_model) and with_it.language_model > 0


def test_the_table_says_what_binds_and_what_fits():
    text = step_time.table(on(2), SHAPE, replace(RATES, link=0.001), available=1)
    assert "Most of it: sending" in text and "At 100 TFLOP/s, 1000 GB/s of memory" in text
    lines = [line for line in text.splitlines() if line.startswith("| ") and "| no |" in line]
    assert [line.split("|")[1].strip() for line in lines] == [str(2**i) for i in range(9)]  # up to D ranks
