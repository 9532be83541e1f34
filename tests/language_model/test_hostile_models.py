"""Model directories that are broken or hostile: one error that names the directory, and nothing in them is run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import hf_model, tokenizer

from sparseclt.language_model.language_model import LanguageModel


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "model"
    hf_model("gpt2", dtype=torch.float32).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def lie(file: Path, proof: Path) -> None:
    file.write_bytes((2**62).to_bytes(8, "little") + file.read_bytes()[8:])


def pickle_instead(file: Path, proof: Path) -> None:
    file.unlink()
    torch.save(Evil(proof), file.with_name("pytorch_model.bin"))


def bring_code(file: Path, proof: Path) -> None:
    file.with_name("evil.py").write_text(
        f"import os\nos.mkdir({str(proof)!r})\nclass Config: pass\nclass Model: pass\n"
    )
    edit(file, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})


def bring_a_tokenizer(file: Path, proof: Path) -> None:
    file.with_name("evil.py").write_text(f"import os\nos.mkdir({str(proof)!r})\nclass Tokenizer: pass\n")
    edit(file, tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})
    file.with_name("tokenizer.json").unlink()


BROKEN = {
    "config of other bytes": ("config.json", lambda file, _: file.write_bytes(b"\xff\xfe{")),
    "config that is a list": ("config.json", lambda file, _: file.write_text("[]")),
    "config nested deeply": ("config.json", lambda file, _: file.write_text("[" * 100_000)),
    "config of wrong types": ("config.json", lambda file, _: edit(file, n_embd="many")),
    "config of negative sizes": ("config.json", lambda file, _: edit(file, n_embd=-32)),
    "header that lies": ("model.safetensors", lie),
    "weights cut off": ("model.safetensors", lambda file, _: os.truncate(file, 5000)),
    "weights empty": ("model.safetensors", lambda file, _: os.truncate(file, 0)),
    "weights pickled": ("model.safetensors", pickle_instead),
    "tokenizer of other bytes": ("tokenizer.json", lambda file, _: file.write_bytes(b"\xff{")),
    "tokenizer without parts": ("tokenizer.json", lambda file, _: file.write_text("{}")),
    "tokenizer settings that are a list": ("tokenizer_config.json", lambda file, _: file.write_text("[]")),
    "code of its own": ("config.json", bring_code),
    "a tokenizer of its own": ("tokenizer_config.json", bring_a_tokenizer),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_a_broken_model_is_an_error_that_names_it_and_runs_nothing(template, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("a question was asked"))
    model, proof = Path(shutil.copytree(template, tmp_path / "model")), tmp_path / "it ran"
    name, damage = BROKEN[kind]
    damage(model / name, proof)
    with pytest.raises(ValueError, match=f"model.path: expected a model that .* in {model}, got ") as error:
        LanguageModel.load(model)
    assert not proof.exists() and "\n" not in str(error.value) and len(str(error.value)) < 600
