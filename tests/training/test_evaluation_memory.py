"""The plan of evaluation and of the choice of connections, against what they really allocate."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from clts import connect_random, random_clt
from test_memory import peak_allocation
from test_plan import configured, make_trainer

from sparseclt.config import CLTConfig, ConnectionConfig, DataConfig, ModelConfig, TrainConfig
from sparseclt.evaluation.metrics import evaluate
from sparseclt.language_model.files import DTYPES
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.shape import ModelShape
from sparseclt.training import memory
from sparseclt.training.evaluation_memory import evaluation_bytes, evaluation_rows
from sparseclt.training.run_sizes import RunSizes
from sparseclt.training.selection_memory import selection_terms

S, D, ROWS = 64, 64, 16


def run(attention="frozen", dtype="fp32", F=512) -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(dtype=dtype), data=DataConfig(row_tokens=S),
        clt=CLTConfig(latents=F, active=8, attention=attention), connections=ConnectionConfig(per_latent=8),
    )  # fmt: skip


def language_model(vocab: int, dtype: str) -> LanguageModel:
    sizes = {"vocab_size": vocab, "max_position_embeddings": S, "hidden_size": D, "intermediate_size": 4 * D}
    config = tiny_models.config("llama")
    config.update({**sizes, "head_dim": D // config.num_attention_heads})
    hf = tiny_models.hf_model(config, dtype=torch.float32).to(DTYPES[dtype])
    return LanguageModel.from_hf(hf, tiny_models.tokenizer())


CASES = {
    "a small vocabulary": (run(), 50),
    "a large vocabulary": (run(), 20_000),
    "attention latents": (run("latents"), 2000),
    "a language model in bf16": (run(dtype="bf16"), 2000),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_and_measured_peaks_of_an_evaluation_agree_within_ten_per_cent(name):
    config, vocab = CASES[name]
    model = language_model(vocab, config.model.dtype)
    clt = random_clt(model, config.clt.attention, latents=config.clt.latents, active=8).float()
    connect_random(clt, 8)
    rows = torch.randint(0, vocab, (ROWS, S), generator=torch.Generator().manual_seed(0))
    evaluate(clt, model, rows[:1])
    with peak_allocation() as peak:
        evaluate(clt, model, rows, batch_rows=ROWS)
    planned = evaluation_bytes(RunSizes(config, model.shape), ROWS)
    assert planned == pytest.approx(peak[0], rel=0.1), f"{planned / 2**20:.1f} and {peak[0] / 2**20:.1f} MiB"


@pytest.mark.parametrize("importance", ["coactivation", "mean"])
def test_planned_and_measured_memory_of_choosing_connections_agree_within_ten_per_cent(importance):
    config = configured(F=2048, rows=16)
    config = replace(
        config,
        compute=replace(config.compute, backend="torch"),
        connections=replace(config.connections, importance=importance, refresh_steps=1),
    )
    trainer, batch = make_trainer(config, 4, 64)
    trainer.train_step(batch)
    with peak_allocation() as peak:
        assert trainer.policy.update(trainer.clt, trainer.activity["vanilla"], trainer.step)
    plan = memory.make_plan(config, trainer.shape)
    planned = sum(term.bytes for term in plan.terms if term.name == "effective decoders")
    planned += sum(term.bytes for term in selection_terms(RunSizes(config, trainer.shape)))
    assert planned == pytest.approx(peak[0], rel=0.1), f"{planned / 2**20:.1f} and {peak[0] / 2**20:.1f} MiB"


def test_the_rows_of_an_evaluation_follow_the_memory():
    config, shape = run(), ModelShape(12, 768, 12, vocab=50_257)
    needed = [evaluation_bytes(RunSizes(config, shape), rows) for rows in (1, 5, 16)]
    assert [evaluation_rows(config, shape, n) for n in (0, *needed, 10 * needed[-1], None)] == [1, 1, 5, 16, 16, 16]
    assert evaluation_rows(config, shape, needed[1] - 1) == 4


def test_a_plan_evaluates_as_many_rows_at_a_time_as_fit_beside_what_is_held():
    config, shape = run(), ModelShape(12, 768, 12, vocab=50_257)
    free = memory.make_plan(config, shape)
    held = free.phase("evaluation") - evaluation_bytes(RunSizes(config, shape), 16)
    tight = memory.make_plan(config, shape, held + evaluation_bytes(RunSizes(config, shape), 3))
    assert tight.phase("evaluation") == tight.available
    (term,) = (term for term in tight.terms if term.phases == ("evaluation",))
    assert term.formula.startswith("3 rows: ")


def test_half_precision_halves_the_language_model_and_what_is_captured():
    shape = ModelShape(26, 2304, 8, parameters=2_614_341_888, vocab=256_000)
    wide, half = (
        {term.name: term.bytes for term in memory.make_plan(run(dtype=dtype), shape).terms}
        for dtype in ("fp32", "bf16")
    )
    assert half["language model"] == wide["language model"] / 2
    assert half["activations captured"] == pytest.approx(wide["activations captured"] / 2, rel=0.01)
    peaks = [memory.make_plan(run(dtype=dtype), shape).peak for dtype in ("fp32", "fp16")]
    assert peaks[1] < peaks[0] - 2 * shape.parameters
