"""The model and tokenizer beside an export are the ones that were trained on, under the names of transformers 4 too."""

import json

import pytest
import torch
from tiny_models import hf_model, tokenizer, tokens

from sparseclt.export.model_files import save_language_model
from sparseclt.language_model.language_model import LanguageModel


@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama"])
def test_the_saved_model_is_the_same_and_has_the_older_names(family, tmp_path):
    hf_model(family, dtype=torch.float32).save_pretrained(tmp_path / "original")
    tokenizer().save_pretrained(tmp_path / "original")
    model = LanguageModel.load(tmp_path / "original")
    save_language_model(model, tmp_path / "saved")
    again, rows = LanguageModel.load(tmp_path / "saved"), tokens()
    assert torch.equal(model.replaced_logits(rows), again.replaced_logits(rows))
    assert again.tokenizer("w3 w44 w1").input_ids == model.tokenizer("w3 w44 w1").input_ids
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    if family == "gpt2":
        assert config["n_ctx"] == config["n_positions"] == 24
    else:
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] and config["rope_scaling"] is None
    if family == "pythia":
        assert config["rotary_pct"] == config["rope_parameters"]["partial_rotary_factor"] == 0.25
    tokens_of = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert tokens_of["tokenizer_class"] == "PreTrainedTokenizerFast" and "backend" not in tokens_of


def test_a_model_without_a_name_is_refused(tmp_path):
    model = LanguageModel.from_hf(hf_model("gpt2"), tokenizer())
    with pytest.raises(ValueError, match="expected one loaded by its name or path"):
        save_language_model(model, tmp_path / "model")
