"""Training with thresholds goes on from the weights it is given, in both modes, with the connections as they are."""

import torch
from clts import connect_random, random_clt
from tiny_models import hf_model, tokenizer, tokens

from sparseclt.config import CLTConfig, ConnectionConfig, DataConfig, OptimizerConfig, TrainConfig
from sparseclt.evaluation.metrics import evaluate
from sparseclt.export.calibration import calibrate
from sparseclt.export.fine_tuning import fine_tune
from sparseclt.language_model.language_model import LanguageModel

ROWS = tokens(rows=40)


def problem(policy: str = "top", learning_rate: float = 5e-3):
    model = LanguageModel.from_hf(hf_model("gpt2", dtype=torch.float32), tokenizer(), name="tiny")
    clt = random_clt(model)
    connect_random(clt, 4)
    if policy == "learned":
        for module in clt:
            if module.upstream:
                module.logits = torch.nn.Parameter(torch.randn(module.latents, 4))
    config = TrainConfig(
        out="unused", batch_rows=8, data=DataConfig(row_tokens=12), clt=CLTConfig(latents=20, active=5),
        connections=ConnectionConfig(policy=policy, per_latent=4, refresh_steps=1),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
    )  # fmt: skip
    return calibrate(clt, model, ROWS[:20]), model, config


def test_fvu_falls_in_both_modes_and_connections_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clt, model, config = problem()
    before = {name: tensor.clone() for name, tensor in clt.state_dict().items()}
    tuned = fine_tune(clt, model, config, 30, ROWS)
    assert all(torch.equal(tensor, before[name]) for name, tensor in clt.state_dict().items())
    for module, other in zip(clt, tuned, strict=True):
        assert module.upstream == 0 or torch.equal(module.connection_indices, other.connection_indices)
        assert not torch.equal(module.threshold, other.threshold) and (other.threshold >= 0).all()
    old, new = (evaluate(c, model, ROWS, cross_entropy=False).mean for c in (clt, tuned))
    assert new.fvu_vanilla < 0.8 * old.fvu_vanilla and new.fvu_sparse < 0.8 * old.fvu_sparse
    assert not tuned.training and all(parameter.requires_grad for parameter in tuned.parameters())
    assert not list(tmp_path.iterdir())


def test_a_step_of_no_size_changes_nothing():
    clt, model, config = problem(learning_rate=0.0)
    tuned = fine_tune(clt, model, config, 1, ROWS)
    for name, tensor in clt.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[name]), name


def test_learned_connections_stay_as_open_as_they_were():
    clt, model, config = problem("learned")
    tuned = fine_tune(clt, model, config, 2, ROWS)
    for module, other in zip(clt, tuned, strict=True):
        assert module.logits is None or torch.equal(module.logits, other.logits)
        assert not torch.equal(module.W_enc, other.W_enc)
