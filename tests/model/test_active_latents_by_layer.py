"""Earlier layers may have more active latents than later ones, at the same number in all."""

import pytest
import torch
from clts import language_model, tokens

from sparseclt.config import CLTConfig, ConnectionConfig, DataConfig, LoggingConfig, LossConfig, TrainConfig
from sparseclt.model.clt import SparseCLT
from sparseclt.model.shape import Architecture, ModelShape, active_by_layer, ratio_of
from sparseclt.training.trainer import Trainer


def test_k_falls_geometrically_with_the_wanted_mean():
    assert active_by_layer(32, 1.0, 4, 1024) == [32] * 4
    assert active_by_layer(32, 2.0, 4, 1024) == [44, 35, 27, 22]
    assert active_by_layer(32, 0.5, 4, 1024) == [22, 27, 35, 44]
    assert active_by_layer(16, 2.0, 1, 1024) == [16]
    assert sum(active_by_layer(32, 3.0, 26, 1024)) == 32 * 26
    assert active_by_layer(2, 100.0, 3, 4) == [4, 1, 1], "from 1 to F"


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.5, 3.7])
@pytest.mark.parametrize(("active", "layers"), [(32, 4), (5, 3), (64, 26), (16, 1)])
def test_the_ratio_can_be_told_from_the_numbers(active, layers, ratio):
    K = active_by_layer(active, ratio, layers, 1024)
    assert active_by_layer(active, ratio_of(K), layers, 1024) == K
    assert ratio_of([3, 9, 3]) is None and ratio_of([2, 3]) is None


def test_it_is_a_positive_number():
    with pytest.raises(ValueError, match="active_ratio: expected more than 0, got 0"):
        Architecture(ModelShape(layers=2, d_model=8), 10, 2, active_ratio=0.0)


@pytest.mark.parametrize("attention", ["frozen", "latents"])
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_each_module_has_its_own_number(tmp_path, attention, activation):
    config = TrainConfig(
        out=str(tmp_path / "run"), batch_rows=4, steps=6, data=DataConfig(row_tokens=12),
        clt=CLTConfig(latents=48, active=6, active_ratio=4.0, attention=attention, activation=activation),
        connections=ConnectionConfig(per_latent=5), loss=LossConfig(sparse_start_share=0.0),
        logging=LoggingConfig(progress=False),
    )  # fmt: skip
    model = language_model("gpt2", torch.float32)
    trainer = Trainer(config, language_model=model, rows=tokens(24, 12))
    clt, activations = trainer.clt, trainer.language_model.capture(tokens(4, 12), attention=attention == "latents")
    K = [clt.architecture.active_of(site.layer) for site in clt.sites]
    assert K[0] > K[-1] and sum(sorted(set(K))) == 6 * model.shape.layers
    trained = trainer.fit().train()
    for mode in ("vanilla", "sparse"):
        for k, latents in zip(K, trained(activations, mode).latents, strict=True):
            on = (latents.values > 0).sum(1)
            if activation == "topk":
                assert latents.values.shape[1] == k
            elif activation == "batchtopk":
                assert on.sum() <= k * activations.counted_tokens
            else:
                assert on.max() <= min(4 * k, 48)
    trained.eval()
    again = SparseCLT.from_pretrained(tmp_path / "run" / "clt")
    assert again.architecture == trained.architecture
    for a, b in zip(again(activations, "sparse").latents, trained(activations, "sparse").latents, strict=True):
        assert torch.equal(a.values, b.values)
