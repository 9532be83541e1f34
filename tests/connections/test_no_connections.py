"""C = 0, no connection at all, and random connections: the controls of every figure about connections."""

import pytest
import torch
from clts import connect_random, language_model, random_clt, tokens

from sparseclt.config import CLTConfig, ConnectionConfig, DataConfig, LoggingConfig, LossConfig, TrainConfig
from sparseclt.connections.policies import RandomConnections, TopConnections
from sparseclt.connections.selection import random_connections
from sparseclt.evaluation.metrics import evaluate
from sparseclt.evaluation.pruning import fvu_against_c
from sparseclt.model.clt import SparseCLT
from sparseclt.training.trainer import Trainer

ROWS = tokens(rows=16, length=12)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", dtype=torch.float32)


def trainer(out, model, attention="frozen", steps=6, **connections) -> Trainer:
    config = TrainConfig(
        out=str(out), steps=steps, batch_rows=2, clt=CLTConfig(latents=16, active=3, attention=attention),
        connections=ConnectionConfig(refresh_steps=2, **connections), loss=LossConfig(sparse_start_share=0.2),
        data=DataConfig(row_tokens=12), logging=LoggingConfig(progress=False),
    )  # fmt: skip
    return Trainer(config, language_model=model, rows=ROWS)


@pytest.mark.parametrize("attention", ["frozen", "latents"])
def test_a_run_without_connections_trains_saves_and_is_measured(tmp_path, model, attention):
    t = trainer(tmp_path / "run", model, attention, per_latent=0)
    before = t.clt.transcoder(-1).W_enc.detach().clone()
    clt = t.fit()
    assert "sparse" in t.objective.modes() and not torch.equal(clt.transcoder(-1).W_enc, before)
    loaded = SparseCLT.from_pretrained(tmp_path / "run" / "clt")
    assert all(module.connections.C == 0 for module in loaded if module.upstream)
    result = evaluate(loaded, model, ROWS)
    assert result.C == 0 and result.cross_entropy.sparse is not None
    last = result.modules[-1]
    assert last.fvu_sparse == pytest.approx(last.fvu_disconnected) and last.connections_in_effect == 0
    assert [point["C"] for point in fvu_against_c(loaded, model, ROWS, [0, 4])] == [0, 4]


def test_no_connection_is_the_same_as_only_empty_slots(model):
    clt, activations = random_clt(model), model.capture(ROWS)
    found = []
    for slots in (0, 3):
        for module in clt:
            if module.upstream:
                module.connect(torch.full((module.latents, slots), -1))
        found.append(clt(activations, "sparse").latents[-1].values)
    torch.testing.assert_close(*found)


def test_random_connections_are_distinct_evenly_spread_and_stay(tmp_path, model):
    clt = random_clt(model, latents=200)
    chosen = random_connections(clt, 20, seed=3)
    assert chosen[0] is None
    counts = torch.bincount(chosen[2].flatten(), minlength=400)
    assert all(len(row.unique()) == 20 for row in chosen[2]) and counts.sum() == 200 * 20
    assert 2 < counts.double().std() < 4  # that of a binomial distribution: 3.1
    assert torch.equal(chosen[2], random_connections(clt, 20, seed=3)[2])
    assert not torch.equal(chosen[2], random_connections(clt, 20, seed=4)[2])
    first, second = (trainer(tmp_path / n, model, policy="random", per_latent=4).fit() for n in ("a", "b"))
    assert torch.equal(first.transcoder(2).connection_indices, second.transcoder(2).connection_indices)
    policy = RandomConnections(4)
    connect_random(clt, 5)
    assert not policy.update(clt, None, 0) and clt.transcoder(1).connections.C == 5


def test_what_c_0_does_not_go_with_is_refused(tmp_path, model):
    with pytest.raises(ValueError, match=r"connections.per_latent: expected 1 to 32 .* got 0"):
        trainer(tmp_path, model, policy="learned", per_latent=0, candidates_after_steps=1)
    with pytest.raises(ValueError, match="connections.start_per_latent: expected None with per_latent = 0, got 8"):
        trainer(tmp_path, model, per_latent=0, start_per_latent=8)
    assert TopConnections(0, anneal_steps=10).at(3) == 0
