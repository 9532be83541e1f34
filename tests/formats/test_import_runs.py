"""A CLT of another tool becomes a run directory, on which every command works that works on a trained one."""

import json

import foreign
import pytest
import torch
from tiny_models import save_model_and_text

from sparseclt import SparseCLT
from sparseclt.cli import main
from sparseclt.runs import load_run


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model directory and a text, as flags."""
    folder = tmp_path_factory.mktemp("material")
    save_model_and_text(folder)
    flags = {"--model.path": folder / "model", "--data.source": folder / "text.txt", "--data.row-tokens": 12,
             "--data.held-out-share": 0.3, "--data.held-out-tokens": 240, "--connections.per-latent": 6}  # fmt: skip
    return [str(part) for pair in flags.items() for part in pair]


@pytest.mark.parametrize(
    ("write", "targets"), [(foreign.circuit_tracer_clt, "all"), (foreign.sparsify, "own")], ids=["clt", "per layer"]
)
def test_every_command_works_on_an_imported_clt(write, targets, material, tmp_path, capsys):
    theirs, run = write(tmp_path / "theirs", foreign.weights(targets, dtype=torch.float32)), str(tmp_path / "run")
    assert main(["import", str(theirs), "--out", run, *material]) == 0
    table = capsys.readouterr().out
    assert "FVU vanilla" in table and "mlp_2" in table
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["C"] == 6 and {point["C"] for point in written["fvu_against_C"]} >= {1, 2, 4, 6}
    clt, model = load_run(run)
    assert clt.connected and clt.architecture.targets == targets and model.shape.layers == 3

    assert main(["eval", run]) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == written
    assert main(["graph", run, "w7 w31 w7 w12"]) == 0
    assert main(["atlas", run, "--out", str(tmp_path / "atlas")]) == 0
    assert (tmp_path / "atlas" / "index.html").exists()
    assert main(["export", run, str(tmp_path / "export")]) == 0
    capsys.readouterr()
    for command in (["resume", run], ["repeat", run, str(tmp_path / "again")]):
        assert main(command) == 2
        assert "was imported" in capsys.readouterr().err


def test_every_token_has_room_for_its_latents_and_runs_and_exports_keep_to_the_hook_that_is_read(material, tmp_path):
    layers, hook = foreign.weights("all", dtype=torch.float32), "hook_resid_mid"
    theirs = foreign.circuit_tracer_clt(tmp_path / "theirs", layers, thresholds=False, feature_input_hook=hook)
    assert main(["import", str(theirs), "--out", str(tmp_path / "run"), *material]) == 0
    clt, model = load_run(tmp_path / "run")
    assert model.shape.mlp_input == clt.architecture.model.mlp_input == hook
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "export")]) == 0
    again = SparseCLT.from_pretrained(
        tmp_path / "export", language_model=model.reading(hook), active=clt.architecture.active
    )
    assert again.architecture == clt.architecture and torch.equal(again.transcoder(1).W_enc, layers[1]["W_enc"])
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    most = max(module["l0_vanilla"] for module in evaluation["modules"])
    assert clt.architecture.activation == "jumprelu" and most < clt.architecture.slots <= foreign.F


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--connections.per-latent", "41"], "connections.per_latent: expected 0 to 40"),
        (["--connections.policy", "learned"], "connections.policy: expected 'top' or 'none'"),
        (["--input-hook", "ln2.hook_normalized"], "input_hook: expected None or 'mlp.hook_in'"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(flags, message, material, tmp_path, capsys):
    theirs = foreign.circuit_tracer_clt(tmp_path / "theirs", foreign.weights("all", dtype=torch.float32))
    assert main(["import", str(theirs), "--out", str(tmp_path / "run"), *material, *flags]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_directory_of_no_known_format_is_one_clear_line(material, tmp_path, capsys):
    assert main(["import", str(tmp_path), "--out", str(tmp_path / "run"), *material]) == 2
    assert "one of the formats circuit-tracer, gemma-scope-2, sparsify, saelens" in capsys.readouterr().err
