"""Runs tokenize their text once; text that cannot be used ends them before they begin, with one line."""

import pytest
import tiny_models
import torch
from tiny_models import hf_model

from sparseclt.cli import main
from sparseclt.config import DataConfig, TrainConfig
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.training.trainer import Trainer


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of 50 tokens, with a tokenizer of 51."""
    folder = tmp_path_factory.mktemp("model")
    hf_model("gpt2", dtype=torch.float32).save_pretrained(folder)
    tokenizer = tiny_models.tokenizer()
    tokenizer.add_tokens(["w50"])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"w1 w50 " * 999, "rows: expected token ids of 0 to 49 (the model's vocabulary), got 50 ('w50')"),
        (b"w1 caf\xe9 " * 99, "data.source: expected UTF-8, got 0xe9 (invalid continuation byte) at byte 6 of"),
        (b"w1", "data.source: expected text for at least one row of 12 tokens, got 1 tokens"),
    ],
    ids=["a token above the vocabulary", "no UTF-8", "too short"],
)
def test_unusable_text_is_one_line(model, tmp_path, capsys, text, message):
    (tmp_path / "text.txt").write_bytes(text)
    flags = {"--model.path": model, "--data.source": tmp_path / "text.txt", "--data.row-tokens": 12}
    arguments = [str(part) for pair in flags.items() for part in pair]
    assert main(["train", *arguments, "--out", str(tmp_path / "out"), "--logging.no-progress"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"sparseclt: {message}") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_eval_and_resume_do_not_tokenize_again(model, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(" ".join(f"w{1 + i % 49}" for i in range(2000)))
    settings = {
        "--model.path": model, "--data.source": tmp_path / "text.txt", "--data.row-tokens": 12, "--steps": 2,
        "--clt.latents": 24, "--clt.active": 3, "--connections.per-latent": 4,
    }  # fmt: skip
    arguments = [*(str(part) for pair in settings.items() for part in pair), "--logging.no-progress", "--out"]
    assert main(["train", *arguments, str(tmp_path / "first")]) == 0
    monkeypatch.setattr("sparseclt.data.text.write_rows", None)
    assert main(["eval", str(tmp_path / "first")]) == 0
    assert main(["resume", str(tmp_path / "first")]) == 0


def test_rows_given_in_python_are_checked_too(model):
    config = TrainConfig(data=DataConfig(row_tokens=12))
    language_model = LanguageModel.load(model)
    with pytest.raises(ValueError, match="rows: expected token ids of 0 to 49 .*, got 50"):
        Trainer(config, language_model=language_model, rows=torch.full((4, 12), 50))
