"""Language models in bf16 and fp16: what is computed from their activations stays that of fp32, up to rounding."""

from dataclasses import replace

import pytest
import tiny_models
import torch
from clts import connect_random, random_clt
from test_trainer import config

from sparseclt.config import ActivationConfig, CLTConfig, ComputeConfig, DataConfig, LossConfig, ModelConfig
from sparseclt.costs import BYTES
from sparseclt.data.activation_stream import token_bytes
from sparseclt.data.text import load_rows
from sparseclt.evaluation.metrics import evaluate
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.sites import MODES
from sparseclt.training.finite import NonFiniteError
from sparseclt.training.trainer import Trainer

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = tiny_models.tokens(rows=30, length=12)
half = pytest.mark.parametrize("dtype", HALVES)


def tiny(dtype: torch.dtype, family: str = "llama") -> LanguageModel:
    return LanguageModel.from_hf(tiny_models.hf_model(family, dtype=torch.float32).to(dtype), tiny_models.tokenizer())


@pytest.fixture(scope="module")
def embedded() -> dict[str, LanguageModel]:
    return {dtype: LanguageModel.load("embedded", dtype=dtype) for dtype in ("fp32", *HALVES)}


@pytest.fixture(scope="module")
def trained(embedded, tmp_path_factory):
    """A CLT of the embedded model, trained for a moment on its activations in fp32, and rows to measure it on."""
    run = replace(
        config(tmp_path_factory.mktemp("run")), steps=40, batch_rows=4, clt=CLTConfig(latents=128, active=8),
        data=DataConfig(row_tokens=128, max_tokens=20_000),
    )  # fmt: skip
    trainer = Trainer(run, language_model=embedded["fp32"])
    return trainer.fit(), load_rows(run, embedded["fp32"].tokenizer, "held_out")[:8]


@half
def test_fvu_and_cross_entropy_are_those_of_fp32_within_two_per_cent(embedded, trained, dtype):
    clt, rows = trained
    expected, found = (evaluate(clt, embedded[name], rows) for name in ("fp32", dtype))
    assert 0.02 < expected.mean.fvu_sparse < 0.7, "the test must be able to tell"
    for mode in MODES:
        fvu = getattr(expected.mean, f"fvu_{mode}")
        assert getattr(found.mean, f"fvu_{mode}") == pytest.approx(fvu, rel=0.02)
    for name, value in vars(expected.cross_entropy).items():
        assert getattr(found.cross_entropy, name) == pytest.approx(value, rel=0.02), name


@half
def test_what_is_captured_has_the_models_dtype_and_takes_half_the_memory(embedded, dtype):
    def vectors(name: str) -> int:
        live = embedded[name].capture(ROWS)
        tensors = [live.r_0, *live.x, *live.mlp_out, *live.attn_out]
        assert {t.dtype for t in tensors} == {HALVES.get(name, torch.float32)}
        assert {t.dtype for t in live.scale} == {torch.float32}
        return sum(t.untyped_storage().nbytes() for t in tensors)

    assert vectors(dtype) == vectors("fp32") / 2
    parameters = embedded[dtype].bridge.original_model.parameters()
    assert {p.dtype for p in parameters} == {HALVES[dtype]}


@half
@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "Gemma2", "Olmo2", "Phi"])
def test_the_identities_hold_up_to_rounding(family, dtype):
    config = family if family in tiny_models.FAMILIES else tiny_models.further_config(family)
    model = tiny(HALVES[dtype], config)
    for layer in range(model.shape.layers):
        assert {t.dtype for t in vars(model.attention_weights(layer)).values() if isinstance(t, torch.Tensor)} == {
            torch.float32
        }


WAYS = {
    "whole batches": {},
    "attention latents": {"clt": CLTConfig(latents=24, active=3, attention="latents")},
    "micro-batches": {"compute": ComputeConfig(micro_batch_rows=1)},
    "cross-entropy": {"loss": LossConfig(sparse_start_share=0.0, cross_entropy_weight=0.5)},
    "CLT in bf16": {"clt": CLTConfig(latents=24, active=3, dtype="bf16")},
    "shuffled": {},
    "from a cache": {},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_trains_like_one_in_fp32(way, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        settings = WAYS[way] | {"model": ModelConfig(dtype=name)}
        if way == "shuffled":  # blocks of as many batches
            settings["activations"] = ActivationConfig(9 * 24 * token_bytes(3, 32, BYTES[name]))
        if way == "from a cache":
            settings["activations"] = ActivationConfig(cache=f"cache_{name}")
        trainer = Trainer(config(tmp_path / name, **settings), language_model=tiny(dtype), rows=ROWS)
        losses[name] = [trainer.train_step(batch)["loss"] for batch in trainer.batches.from_step(0)]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["bf16"] != losses["fp32"]


def test_a_pass_over_half_precision_activations_computes_in_float32():
    model = tiny(torch.bfloat16)
    clt = random_clt(tiny(torch.float32), "latents")
    connect_random(clt, 6)
    live = model.capture(ROWS, attention=True)
    wide = replace(
        live,
        **{name: [t.float() for t in kept] for name, kept in vars(live).items() if isinstance(kept, list)},
        r_0=live.r_0.float(),
    )
    for mode in MODES:
        forward, expected = clt(live, mode), clt(wide, mode)
        for site in clt.sites:
            assert forward.output(site).dtype == torch.float32
            assert torch.equal(forward.output(site), expected.output(site)), (mode, site)


def test_overflow_in_fp16_is_named_when_a_model_is_loaded_and_when_it_trains(tmp_path):
    hf = tiny_models.hf_model("llama", dtype=torch.float32).half()
    model = LanguageModel.from_hf(hf, tiny_models.tokenizer())
    trainer = Trainer(config(tmp_path / "run"), language_model=model, rows=ROWS)
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight.fill_(6e4)
    expected = (
        r"the model's mlp_out of layer 1 has NaN or Inf; .*fp16 ends at 65,504: give model.dtype 'bf16' or 'fp32'"
    )
    with pytest.raises(NonFiniteError, match=expected):
        trainer.fit()
    with pytest.raises(ValueError, match="model.dtype: LlamaForCausalLM overflows in fp16"):
        LanguageModel.from_hf(hf, tiny_models.tokenizer())


def test_unknown_dtypes_are_named():
    with pytest.raises(ValueError, match="dtype: expected one of fp32, bf16, fp16, got 'float16'"):
        LanguageModel.load("embedded", dtype="float16")  # type: ignore[arg-type]
