"""The control whose weights are in random order."""

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import hf_model, tokenizer, tokens

from sparseclt.language_model.files import load_hf
from sparseclt.language_model.language_model import LanguageModel

TOOLS = Path(__file__).parents[2] / "tools"


def test_every_tensor_keeps_its_numbers_in_another_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(TOOLS), *sys.path])
    import randomise_model

    hf_model("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    randomise_model.main([str(tmp_path / "model"), str(tmp_path / "control")])
    real, control = (LanguageModel.load(tmp_path / name) for name in ("model", "control"))
    hf_models = (load_hf(tmp_path / name, torch.float32)[0] for name in ("model", "control"))
    pairs = list(zip(*(m.parameters() for m in hf_models), strict=True))
    assert all(torch.equal(a.flatten().sort().values, b.flatten().sort().values) for a, b in pairs)
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert not torch.allclose(real.cross_entropy(tokens()), control.cross_entropy(tokens()))
    with pytest.raises(SystemExit):
        randomise_model.main([str(tmp_path / "model"), str(tmp_path / "control")])
    assert "out: expected a new directory" in capsys.readouterr().err
