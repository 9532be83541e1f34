"""The command: its flags are frozen, its runs reproduce, its errors are one line."""

import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from tiny_models import hf_model, tokenizer

from sparseclt.cli import main
from sparseclt.config import TrainConfig, from_dict, to_dict
from sparseclt.training.loggers import read_metrics

COMMANDS = ("train", "resume", "repeat", "eval", "sweep", "bench-report")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model directory and a text, and the flags of a quick run on them."""
    import torch

    folder = tmp_path_factory.mktemp("material")
    hf_model("gpt2", dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 50, (900,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    flags = {
        "--model.path": folder / "model", "--data.source": folder / "text.txt", "--data.row-tokens": 12,
        "--data.held-out-share": 0.3, "--clt.latents": 24, "--clt.active": 3, "--connections.per-latent": 4,
        "--steps": 6, "--checkpoints.every-steps": 3, "--logging.every-steps": 1,
    }  # fmt: skip
    return [str(part) for pair in flags.items() for part in pair] + ["--logging.no-progress"]


@pytest.fixture(scope="module")
def run(material, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert main(["train", *material, "--out", str(out)]) == 0
    return out


def test_a_run_directory_holds_weights_metrics_tables_and_pictures(run):
    for name in (
        "config.json", "metrics.jsonl", "evaluation.json", "table.md", "loss.png", "fvu_against_c.png",
        "clt/W_enc_0.safetensors", "clt/config.yaml", "checkpoints/step_00000006/manifest.json",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name


def test_eval_prints_the_table_again(run, capsys):
    before = json.loads((run / "evaluation.json").read_text())
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert "FVU vanilla" in out and "mlp_2" in out and "zero-ablated" in out
    assert json.loads((run / "evaluation.json").read_text()) == before


def test_a_run_directory_reproduces_its_own_run(run, tmp_path):
    assert main(["repeat", str(run), str(tmp_path / "again")]) == 0
    assert read_metrics(tmp_path / "again" / "metrics.jsonl") == read_metrics(run / "metrics.jsonl")


def test_resume_of_a_finished_run_changes_nothing(run, capsys):
    before = read_metrics(run / "metrics.jsonl")
    assert main(["resume", str(run)]) == 0
    assert read_metrics(run / "metrics.jsonl") == before


def test_sweep_writes_the_table_and_the_plot(material, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert main(["sweep", *material, "--out", str(out), "--connections", "2", "8"]) == 0
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [row["C"] for row in rows] == [2, 8] and all(row["fvu_pruned"] > 0 for row in rows)
    assert (out / "fvu_against_c.png").stat().st_size > 0 and (out / "C_8" / "clt" / "config.yaml").exists()
    assert "FVU pruned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clt.active", "25"], "clt.active: expected at most clt.latents = 24, got 25"),
        (["--connections.per-latent", "49"], "connections.per_latent: expected 1 to 48"),
        (["--model.path", "./nowhere"], "model.path: expected"),
        (["--data.source", "./nowhere.txt"], "data.source: expected"),
        (["--data.row-tokens", "25"], "data.row_tokens: expected at most the model's context of 24, got 25"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--loss.sparse-ramp-share", "1.5"], "sparse_ramp_share: expected a share between 0 and 1, got 1.5"),
        (["--logging.loggers", "carrierpigeon"], "carrierpigeon"),
        (["--compute.backend", "cobol"], "cobol"),
        (["--activations.shuffle-bytes", "5"], "activations.shuffle_bytes: expected at least"),
    ],
)
def test_bad_input_is_one_clear_line(material, tmp_path, capsys, flags, message):
    assert main(["train", *material, "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparseclt: ") and message in error and "Traceback" not in error


def test_eval_of_no_run_says_what_was_expected(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "run: expected a run directory with config.json" in capsys.readouterr().err


def test_the_flags_are_these():
    """A renamed flag breaks other people's scripts: change this list knowingly."""

    def flags(kind, prefix=""):
        for f in fields(kind):
            if is_dataclass(f.default_factory):
                yield from flags(f.default_factory, f"{prefix}{f.name}.")
            else:
                yield prefix + f.name

    assert list(flags(TrainConfig)) == [
        "out", "model.path", "model.layers", "data.source", "data.text_field", "data.row_tokens", "data.max_tokens",
        "data.held_out_tokens", "data.held_out_share", "clt.latents", "clt.active", "clt.attention", "clt.dtype",
        "connections.policy", "connections.per_latent", "connections.start_per_latent", "connections.anneal_share",
        "connections.refresh_steps", "connections.candidates_after_steps", "connections.freeze_after_share",
        "connections.importance", "connections.recent_tokens", "connections.pressure_weight",
        "loss.sparse_start_share", "loss.sparse_ramp_share", "loss.latent_agreement_weight", "loss.aux_weight",
        "loss.aux_latents", "loss.dead_after_tokens", "loss.cross_entropy_weight", "optimizer.learning_rate",
        "optimizer.warmup_share", "optimizer.decay_share", "optimizer.betas", "optimizer.clip_norm",
        "optimizer.state", "optimizer.rows", "activations.shuffle_bytes", "activations.cache",
        "activations.cache_dtype", "compute.micro_batch_rows", "compute.backend", "logging.every_steps",
        "logging.loggers", "logging.progress", "checkpoints.every_steps", "checkpoints.keep", "steps", "batch_rows",
        "seed", "device",
    ]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "usage: sparseclt" in out
    if command in ("train", "sweep"):
        assert "Connections kept for each latent" in " ".join(out.replace("│", " ").split())


def test_the_configuration_survives_json():
    config = TrainConfig()
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_an_unknown_field_is_named():
    values = to_dict(TrainConfig())
    values["clt"]["width"] = 3
    with pytest.raises(ValueError, match=r"config: unknown field clt.width"):
        from_dict(values)


def test_importing_sparseclt_brings_in_nothing_heavy_and_prints_nothing():
    code = (
        "import sys, sparseclt, sparseclt.ops\n"
        "from sparseclt import TrainConfig, SparseCLT\n"
        "heavy = {'transformer_lens', 'transformers', 'datasets', 'matplotlib', 'tyro', 'wandb', 'triton'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
