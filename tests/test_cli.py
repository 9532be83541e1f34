"""The command: its flags are frozen, its runs reproduce, its errors are one line."""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import save_model_and_text

from sparseclt.cli import main
from sparseclt.training.loggers import read_metrics

COMMANDS = (
    "train", "resume", "repeat", "import", "eval", "sweep", "experiment", "atlas", "plan", "graph", "intervene",
    "export", "push", "selftest",
)  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model directory and a text, and the flags of a quick run on them."""
    folder = tmp_path_factory.mktemp("material")
    save_model_and_text(folder)
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
        "config.json", "metrics.jsonl", "evaluation.json", "table.md", "loss.png", "fvu_against_c.png", "density.png",
        "clt/W_enc_0.safetensors", "clt/config.yaml", "checkpoints/step_00000006/manifest.json",
    ):  # fmt: skip
        assert (run / name).stat().st_size > 0, name


def test_eval_prints_the_table_again(run, capsys):
    before = json.loads((run / "evaluation.json").read_text())
    assert main(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    assert "FVU vanilla" in out and "mlp_2" in out and "zero-ablated" in out
    assert json.loads((run / "evaluation.json").read_text()) == before


def test_eval_with_faithfulness_says_whether_connections_matter(run, capsys):
    assert main(["eval", str(run), "--faithfulness"]) == 0
    out = capsys.readouterr().out
    assert "shuffled connections" in out and "C random ones" in out and "completeness" in out
    assert (run / "faithfulness.md").read_text() in out
    assert json.loads((run / "faithfulness.json").read_text())["agreement"]["sparse"]["kl"] > 0
    assert main(["eval", str(run), "--faithfulness", "--checkpoint", "step_00000006"]) == 2
    assert "faithfulness: expected a finished run without --checkpoint" in capsys.readouterr().err


def test_eval_with_interaction_sparsity_says_how_few_connections_are_needed(run, capsys):
    assert main(["eval", str(run), "--interaction-sparsity"]) == 0
    out = capsys.readouterr().out
    assert "connections kept per latent" in out and (run / "interaction.md").read_text() in out
    figures = json.loads((run / "interaction.json").read_text())
    assert figures["edges"] == "own" and figures["curve"][0]["kl"] > 0
    assert (run / "interaction.png").stat().st_size > 0
    assert main(["eval", str(run), "--interaction-sparsity", "--checkpoint", "step_00000006"]) == 2
    assert "interaction_sparsity: expected a finished run without --checkpoint" in capsys.readouterr().err


def test_a_run_directory_reproduces_its_own_run(run, tmp_path):
    assert main(["repeat", str(run), str(tmp_path / "again")]) == 0
    assert read_metrics(tmp_path / "again" / "metrics.jsonl") == read_metrics(run / "metrics.jsonl")


def test_resume_of_a_finished_run_changes_nothing(run, capsys):
    before = read_metrics(run / "metrics.jsonl")
    assert main(["resume", str(run)]) == 0
    assert read_metrics(run / "metrics.jsonl") == before


def test_sweep_writes_the_table_and_the_plot(material, tmp_path, capsys):
    out = tmp_path / "sweep"
    assert main(["sweep", *material, "--out", str(out), "--connections", "8", "0"]) == 0
    rows = json.loads((out / "sweep.json").read_text())["rows"]
    assert [row["C"] for row in rows] == [0, 8] and all(row["fvu_pruned"] > 0 for row in rows)
    assert rows[1]["fvu_random"] > 0 and "fvu_random" not in rows[0] and rows[0]["explained_by_connections"] == 0
    C_8 = json.loads((out / "C_8" / "evaluation.json").read_text())["mean"]
    assert rows[1]["propagated_error"] == C_8["propagated_error"] and rows[1]["cofiring_twins"] is not None
    assert (out / "fvu_against_c.png").stat().st_size > 0 and (out / "C_8" / "clt" / "config.yaml").exists()
    assert "FVU pruned" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--clt.active", "25"], "clt.active: expected at most clt.latents = 24, got 25"),
        (["--clt.active", "0"], "clt.active: expected at least 1, got 0"),
        (["--optimizer.clip-norm", "-1"], "optimizer.clip_norm: expected more than 0 or None, got -1.0"),
        (["--optimizer.betas", "0.9", "1"], "optimizer.betas[1]: expected less than 1, got 1.0"),
        (["--loss.l0-weight", "nan"], "loss.l0_weight: expected a finite number, got nan"),
        (["--connections.per-latent", "49"], "connections.per_latent: expected 0 to 48"),
        (["--model.path", "./nowhere"], "model.path: expected"),
        (["--data.source", "./nowhere.txt"], "data.source: expected"),
        (["--data.row-tokens", "25"], "data.row_tokens: expected at most the model's context of 24, got 25"),
        (["--steps", "0"], "steps: expected at least 1, got 0"),
        (["--device", "gpu"], "device: expected 'auto' or a device of torch, got 'gpu'"),
        (["--loss.sparse-ramp-share", "1.5"], "loss.sparse_ramp_share: expected at most 1, got 1.5"),
        (["--logging.loggers", "wandb", "wandb"], "logging.loggers: expected each logger at most once"),
        (["--activations.shuffle-bytes", "5"], "activations.shuffle_bytes: expected at least"),
    ],
)
def test_bad_input_is_one_clear_line(material, tmp_path, capsys, flags, message):
    assert main(["train", *material, "--out", str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparseclt: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--connections.policy", "tpo"], ["'tpo'", "--connections.policy", "'dense-learned'"]),
        (["--logging.loggers", "carrierpigeon"], ["'carrierpigeon'", "--logging.loggers", "'tensorboard'"]),
        (["--compute.backend", "cobol"], ["'cobol'", "--compute.backend", "'numba'"]),
        (["--clt.latents", "many"], ["'many'", "--clt.latents"]),
        (["--clt.width", "3"], ["--clt.width"]),
    ],
)
def test_flags_that_cannot_be_read_are_named(capsys, flags, parts):
    with pytest.raises(SystemExit) as stop:
        main(["train", *flags])
    assert stop.value.code == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert all(part in error for part in parts), error


def test_eval_of_no_run_says_what_was_expected(tmp_path, capsys):
    assert main(["eval", str(tmp_path)]) == 2
    assert "run: expected a run directory with config.json" in capsys.readouterr().err


def test_graph_prints_a_summary_and_writes_graph_json_into_the_run(run, tmp_path, capsys):
    assert main(["graph", str(run), "w3 w14 w15"]) == 0
    out = capsys.readouterr().out
    assert "edges kept" in out and "Strongest paths" in out
    (path,) = (path for path in (run / "graphs").glob("*.json") if path.name != "graph-metadata.json")
    assert out.endswith(f"Graph: {path}\n") and json.loads(path.read_text())["metadata"]["prompt"] == "w3 w14 w15"
    other = tmp_path / "mine.json"
    assert main(["graph", str(run), "w3 w14", "--error-nodes", "--node-share", "0.5", "--out", str(other)]) == 0
    assert json.loads(other.read_text())["metadata"]["pruning_settings"]["node_threshold"] == 0.5


def test_intervene_prints_the_change_of_each_logit_in_both_modes(run, capsys):
    assert main(["intervene", str(run), "w3 w14 w15", "--latents", "mlp_0/3@2=1.5", "mlp_2/1@-1=x0"]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out and "vanilla mode" in out and "sparsely-connected mode" in out


def test_export_writes_thresholds_and_prints_what_they_cost(run, tmp_path, capsys):
    from safetensors.torch import load_file

    out = tmp_path / "export"
    assert main(["export", str(run), str(out), "--finetune-steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "FVU as trained | FVU calibrated | FVU fine-tuned" in printed and "Sparsely-connected mode" in printed
    assert set(load_file(out / "W_enc_1.safetensors")) == {"W_enc_1", "b_enc_1", "b_dec_1", "threshold_1"}
    assert "mlp.hook_in" in (out / "config.yaml").read_text() and "load_clt" in (out / "README.md").read_text()
    for name in ("model/model.safetensors", "model/tokenizer.json", "features/index.json.gz", "features/layer_2.bin"):
        assert (out / name).is_file()


def test_export_for_neuronpedia_keeps_top_k(run, tmp_path, capsys):
    arguments = ["export", str(run), str(tmp_path / "out"), "--format", "neuronpedia"]
    assert main([*arguments, "--finetune-steps", "2"]) == 2
    assert "finetune_steps: expected 0 with format 'neuronpedia'" in capsys.readouterr().err
    assert main(arguments) == 0
    assert (tmp_path / "out" / "model" / "0-first" / "features" / "batch-0.jsonl.gz").is_file()


def test_export_of_weights_for_other_trainers(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "sparsify"]) == 0
    K = [json.loads((tmp_path / "out" / f"h.{layer}.mlp" / "cfg.json").read_text())["k"] for layer in range(3)]
    assert sum(K) == 3 * json.loads((run / "config.json").read_text())["clt"]["active"] and K[0] > K[-1]
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "sae"), "--format", "saelens"]) == 2
    assert "decoders to later layers" in capsys.readouterr().err and not (tmp_path / "sae").exists()


def test_special_tokens_in_a_prompt_are_text_or_tokens_and_stay_text_in_the_atlas(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    for name, flags in {"text": [], "tokens": ["--special-tokens"]}.items():
        out = ["--out", str(tmp_path / "run" / "graphs" / f"{name}.json")]
        assert main(["graph", str(tmp_path / "run"), "<s> w1 <s>", *flags, *out]) == 0
    graphs = {
        name: json.loads((tmp_path / "run" / "graphs" / f"{name}.json").read_text()) for name in ("text", "tokens")
    }
    assert graphs["tokens"]["metadata"]["prompt_tokens"] == ["<s>", "w1", "<s>"]
    assert len(graphs["text"]["metadata"]["prompt_tokens"]) > 3
    assert main(["atlas", str(tmp_path / "run"), "--out", str(tmp_path / "atlas")]) == 0
    for name, graph in graphs.items():
        shown = json.loads(gzip.decompress((tmp_path / "atlas" / "data" / "graphs" / f"{name}.json.gz").read_bytes()))
        assert shown["metadata"]["prompt"] == graph["metadata"]["prompt"] == "<s> w1 <s>"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["graph", "RUN", ""], "prompt: expected some text"),
        (["graph", "RUN", "w1 " * 30], "prompt: expected at most 24 tokens"),
        (["graph", "RUN", "<s>", "--special-tokens"], "prompt: expected text behind the token that begins a document"),
        (["intervene", "RUN", " ", "--latents", "mlp_0/1@1=0"], "prompt: expected some text"),
        (["intervene", "RUN", "w1 " * 30, "--latents", "mlp_0/1@1=0"], "prompt: expected at most 24 tokens"),
        (["intervene", "RUN", "<s>", "--special-tokens", "--latents", "mlp_0/1@1=0"], "prompt: expected text behind"),
        (["atlas", "RUN", "--tokens", "5"], "tokens: expected at least one row of 12 tokens, got 5"),
        (["graph", "RUN", "w1", "--edge-share", "2"], "edge_share: expected a share from 0 to 1, got 2.0"),
        (["graph", "RUN", "w1", "--out", "graph.txt"], "out: expected a file named NAME.json"),
        (["intervene", "RUN", "w1", "--latents", "mlp_7/1@1=0"], "latents: expected a site of this CLT"),
        (["intervene", "RUN", "w1", "--latents", "everything"], "latents: expected SITE/LATENT@POSITIONS=VALUE"),
    ],
)
def test_a_graph_of_bad_input_is_one_clear_line(run, capsys, arguments, message):
    assert main([str(run) if argument == "RUN" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparseclt: ") and error.count("\n") == 1 and message in error


FLAGS = """
    --activations.cache --activations.cache-dtype --activations.shuffle-bytes --batch-rows --checkpoints.every-minutes
    --checkpoints.every-steps --checkpoints.keep --clt.activation --clt.active --clt.active-ratio --clt.attention
    --clt.bandwidth --clt.dtype --clt.latents --clt.targets --compute.backend --compute.micro-batch-rows
    --compute.precision
    --connections.anneal-share --connections.budget --connections.candidates-after-steps --connections.exchange-share
    --connections.freeze-after-share --connections.importance --connections.open-per-latent --connections.per-latent
    --connections.policy --connections.pressure-weight --connections.recent-tokens --connections.refresh-steps
    --connections.start-per-latent --data.bos --data.cache --data.held-out-share --data.held-out-tokens
    --data.max-tokens --data.row-tokens --data.source --data.text-field --device --help --logging.every-steps
    --logging.loggers --logging.no-progress --logging.progress --loss.cross-entropy-weight --loss.interaction-weight
    --loss.l0-weight --loss.latent-agreement-weight --loss.sparse-ramp-share --loss.sparse-start-share --model.dtype
    --model.layers --model.path --optimizer.betas --optimizer.clip-norm --optimizer.dead-after-tokens
    --optimizer.decay-share --optimizer.learning-rate --optimizer.revival-rate --optimizer.rows --optimizer.state
    --optimizer.warmup-share --out --parallel.data --parallel.latents --parallel.model-devices
    --parallel.timeout-seconds --seed --steps
""".split()


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_flags_of_train_are_these(capsys):
    """A renamed flag breaks other people's scripts: change this list knowingly."""
    assert sorted(set(re.findall(r"--[a-z][a-z0-9.-]*", help_of("train", capsys)))) == FLAGS


def test_the_help_begins_with_the_fields_that_every_run_sets(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of("train", capsys)
    order = ["--out", "--steps", "--device", "--model.path", "--data.source", "--clt.latents", "--connections.policy"]
    experts = ["--loss.", "--optimizer.", "--activations.", "--compute.", "--logging.", "--checkpoints.", "--parallel."]
    places = [text.index(flag) for flag in order + experts]
    assert places == sorted(places)
    assert text.count("For experts:") == len(experts)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_what_a_command_does(command, capsys):
    out = help_of(command, capsys)
    assert "usage: sparseclt" in out
    if command in ("train", "sweep", "plan"):
        assert "Connections per latent (C)" in " ".join(out.replace("│", " ").split())


def test_importing_sparseclt_brings_in_nothing_heavy_and_prints_nothing():
    code = (
        "import sys, sparseclt, sparseclt.ops\n"
        "from sparseclt import TrainConfig, SparseCLT\n"
        "heavy = {'transformer_lens', 'transformers', 'datasets', 'matplotlib', 'tyro', 'wandb', 'triton'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_atlas_writes_pages_of_a_run(run, tmp_path, capsys):
    assert main(["atlas", str(run), "--out", str(tmp_path / "pages")]) == 0
    assert (tmp_path / "pages" / "index.html").is_file() and "Atlas: " in capsys.readouterr().out
    assert (tmp_path / "pages" / "data" / "latents" / "2" / "0.json.gz").stat().st_size > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", "3"], "tokens: expected at least one row of 12 tokens, got 3"),
        (["--out", "RUN"], "out: expected an atlas, an empty directory or a new one"),
    ],
)
def test_atlas_refuses_what_it_cannot_do(run, capsys, flags, message):
    assert main(["atlas", str(run), *(flag.replace("RUN", str(run)) for flag in flags)]) == 2
    assert message in capsys.readouterr().err and (run / "config.json").is_file()
