"""`sparseclt push` uploads a run's CLT with its evaluation; a dry run writes the same folder."""

import copy
import json
from dataclasses import replace

import pytest

from sparseclt.cli import main
from sparseclt.config import DataConfig, ModelConfig, TrainConfig
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.run_config import write_config

EVALUATION = {"modules": [{"name": "mlp_0", "fvu_vanilla": 0.125}], "mean": {"fvu_vanilla": 0.125}}


@pytest.fixture
def run(clt, tmp_path):
    """A finished run, as far as a push reads it."""
    run = tmp_path / "runs" / "tiny"
    named = copy.deepcopy(clt)
    named.architecture = replace(clt.architecture, model=replace(clt.architecture.model, name=str(tmp_path / "model")))
    named.save_pretrained(run / "clt")
    model, data = ModelConfig(path=str(tmp_path / "secret" / "model")), DataConfig(source="/home/somebody/text")
    write_config(run, TrainConfig(out=str(run), model=model, data=data))
    (run / "evaluation.json").write_text(json.dumps(EVALUATION))
    return run


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_push_uploads_what_the_dry_run_writes(hub, run, tmp_path, capsys):
    assert main(["push", str(run), "me/tiny", "--dry-run", str(tmp_path / "dry")]) == 0
    assert hub.requests == [] and str(tmp_path / "dry") in capsys.readouterr().out
    assert main(["push", str(run), "me/tiny", "--token", "hf_secret", "--revision", "v1", "--private"]) == 0
    assert f"{hub.url}/me/tiny/commit/" in capsys.readouterr().out
    uploaded = hub.files["me/tiny", "v1"]
    assert uploaded == files_of(tmp_path / "dry")
    assert {"README.md", "config.json", "evaluation.json", "manifest.json", "W_enc_0.safetensors"} <= set(uploaded)
    assert json.loads(uploaded["evaluation.json"]) == EVALUATION
    assert b"| mlp_0  |      0.1250 |" in uploaded["README.md"]
    assert SparseCLT.from_pretrained(tmp_path / "dry").connected


def test_no_folder_of_this_machine_is_uploaded(run, tmp_path):
    assert main(["push", str(run), "me/tiny", "--dry-run", str(tmp_path / "dry")]) == 0
    for name, content in files_of(tmp_path / "dry").items():
        assert str(tmp_path).encode() not in content and b"somebody" not in content, name
    config = json.loads((tmp_path / "dry" / "config.json").read_text())
    assert config["model"]["path"] == "model" and config["data"]["source"] == "text" and config["out"] == "tiny"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "evaluation.json").unlink(), "run: expected an evaluated run"),
        (lambda run: (run / "config.json").unlink(), "run: expected a run directory with config.json"),
        (lambda run: (run / "clt").rename(run / "elsewhere"), "run: expected a finished run"),
    ],
    ids=["not evaluated", "no run", "not finished"],
)
def test_a_run_that_cannot_be_shown_is_not_pushed(hub, run, capsys, spoil, message):
    spoil(run)
    assert main(["push", str(run), "me/tiny"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparseclt: ") and error.count("\n") == 1 and message in error
    assert hub.requests == []


@pytest.mark.parametrize("name", ["tiny/../x", "a/b/c", "na me/tiny"])
def test_a_name_that_the_hub_does_not_allow_is_one_clear_line(hub, run, capsys, name):
    assert main(["push", str(run), name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparseclt: ") and error.count("\n") == 1
