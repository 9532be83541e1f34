"""Experiments: one table of many runs, which goes on where it was stopped and refuses other runs in their place."""

import json
import re
import shutil
from pathlib import Path

import pytest
from test_cli import material  # noqa: F401  the fixture
from test_long_runs import interrupt_at, no_pictures, one_line, usual_handler  # noqa: F401

from sparseclt.cli import main
from sparseclt.config.strict import ConfigError
from sparseclt.evaluation import plots
from sparseclt.experiments import conduct, registry
from sparseclt.experiments.columns import COLUMNS
from sparseclt.experiments.experiment import Experiment, Variant
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.training.trainer import Trainer

FAITHFUL = Experiment(
    "faithful", "Is it?", (Variant("C_4", "--connections.per-latent 4"),),
    ("fvu_shuffled", "carried", "carried_random", "agreement_shuffled", "top1", "replacement"),
    "--steps 3 --checkpoints.every-steps 3",
)  # fmt: skip
TINY = Experiment(
    "tiny",
    "Does C matter?",
    (
        Variant("vanilla", "--connections.policy none"),
        Variant("C_0", "--connections.per-latent 0", "vanilla"),
        Variant("C_4", "--connections.per-latent 4", "vanilla", "C_0"),
    ),
    (
        "fvu_vanilla",
        "fvu_sparse",
        "excess_over_vanilla",
        "explained",
        "worst_dead_vanilla",
        "total_l0",
        "seconds",
        "recovered_vanilla",
        "kl_8",
        "area",
    ),  # fmt: skip
    "--steps 3 --checkpoints.every-steps 3",
)


@pytest.fixture(scope="module")
def options(material):  # noqa: F811
    """The quick run's options, except those that the experiment sets."""
    at = material.index("--steps")
    return [*material[:at], "--logging.no-progress"]


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(registry.EXPERIMENTS, "tiny", TINY)


@pytest.fixture(scope="module")
def out(options, tmp_path_factory):
    """The tiny experiment with two seeds, finished."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.EXPERIMENTS, "tiny", TINY)
        for name in ("densities", "fvu_against_c", "loss_curves"):  # they take most of the time of such short runs
            patch.setattr(plots, name, lambda *a, **k: None)
        out = tmp_path_factory.mktemp("experiments") / "tiny"
        assert main(["experiment", "tiny", "--seeds", "2", "--out", str(out), *options]) == 0
    return out


def mean_of(run: Path) -> dict:
    return json.loads((run / "evaluation.json").read_text())["mean"]


def test_the_table_has_a_row_per_variant_and_the_spread_over_seeds(out):
    rows = json.loads((out / "tiny.json").read_text())["rows"]
    assert [(row["variant"], row["seeds"]) for row in rows] == [(v.label, [0, 1]) for v in TINY.variants]
    found = {row["variant"]: row["columns"] for row in rows}
    sparse = [mean_of(out / "C_4" / f"seed_{seed}")["fvu_sparse"] for seed in (0, 1)]
    cell = found["C_4"]["fvu_sparse"]
    assert cell == {"values": sparse, "mean": sum(sparse) / 2, "least": min(sparse), "most": max(sparse)}
    vanilla = [mean_of(out / "vanilla" / f"seed_{seed}")["fvu_vanilla"] for seed in (0, 1)]
    excess = [s - v for s, v in zip(sparse, vanilla, strict=True)]
    assert found["C_4"]["excess_over_vanilla"]["values"] == pytest.approx(excess)
    assert found["vanilla"]["fvu_sparse"] is None and found["vanilla"]["excess_over_vanilla"] is None
    assert found["C_0"]["total_l0"]["mean"] > 3 and found["C_0"]["seconds"]["least"] > 0
    text = (out / "tiny.md").read_text()
    assert f"{cell['mean']:.4f} ({cell['least']:.4f} to {cell['most']:.4f})" in text
    assert TINY.question in text and "sparseclt experiment tiny --" in text and "--clt.latents 24" in text


def test_each_seed_is_a_run_of_its_own(out):
    seeds = [json.loads((out / "C_4" / f"seed_{seed}" / "config.json").read_text())["seed"] for seed in (0, 1)]
    assert seeds == [0, 1]
    assert mean_of(out / "C_4" / "seed_0")["fvu_vanilla"] != mean_of(out / "C_4" / "seed_1")["fvu_vanilla"]


def test_explained_by_connections_is_measured_against_the_run_without_any(out):
    rows = {row["variant"]: row["columns"] for row in json.loads((out / "tiny.json").read_text())["rows"]}
    shares = []
    for seed in (0, 1):
        without, C_4 = (mean_of(out / label / f"seed_{seed}") for label in ("C_0", "C_4"))
        if C_4["fvu_all_open"] < without["fvu_sparse"]:
            way = without["fvu_sparse"] - C_4["fvu_all_open"]
            shares.append((without["fvu_sparse"] - C_4["fvu_sparse"]) / way)
    explained = rows["C_4"]["explained"]
    assert explained is None if len(shares) < 2 else explained["values"] == pytest.approx(shares)


def test_what_columns_need_is_measured_and_drawn(out):
    rows = {row["variant"]: row["columns"] for row in json.loads((out / "tiny.json").read_text())["rows"]}
    runs = [json.loads((out / "C_4" / f"seed_{seed}" / "interaction.json").read_text()) for seed in (0, 1)]
    assert rows["C_4"]["area"]["values"] == [run["area"] for run in runs]
    assert rows["C_4"]["kl_8"]["values"] == [run["curve"][4]["kl"] for run in runs]
    assert rows["vanilla"]["area"]["least"] > 0, "of all pairs, pruned"
    entropies = json.loads((out / "C_0" / "seed_0" / "evaluation.json").read_text())["cross_entropy"]
    way = entropies["zero_ablated"] - entropies["model"]
    recovered = (entropies["zero_ablated"] - entropies["vanilla"]) / way
    assert rows["C_0"]["recovered_vanilla"]["values"][0] == pytest.approx(recovered)
    assert (out / "tiny.png").stat().st_size > 0


@pytest.mark.usefixtures("no_pictures")
def test_figures_that_were_not_measured_yet_are_measured_without_training(out, options, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.EXPERIMENTS, "faithful", FAITHFUL)
    monkeypatch.setattr(Trainer, "train_step", lambda *a: pytest.fail("a finished run was trained"))
    shutil.copytree(out / "C_4" / "seed_0", tmp_path / "C_4" / "seed_0")
    assert main(["experiment", "faithful", "--seeds", "1", "--out", str(tmp_path), *options]) == 0
    (row,) = json.loads((tmp_path / "faithful.json").read_text())["rows"]
    figures = json.loads((tmp_path / "C_4" / "seed_0" / "faithfulness.json").read_text())
    shares = [ablation["carried"] for ablation in figures["ablations"]]
    assert row["columns"]["carried"]["mean"] == pytest.approx(sum(shares) / len(shares))
    assert row["columns"]["agreement_shuffled"]["mean"] == figures["agreement"]["shuffled"]["kl"]
    assert row["columns"]["replacement"]["mean"] == figures["graphs"]["replacement"]


def test_a_finished_experiment_is_neither_trained_nor_measured_again(out, options, monkeypatch, capsys):
    monkeypatch.setattr(LanguageModel, "load", lambda *a, **k: pytest.fail("the language model was loaded"))
    before = (out / "tiny.json").read_text()
    assert main(["experiment", "tiny", "--seeds", "2", "--out", str(out), *options]) == 0
    assert (out / "tiny.json").read_text() == before
    assert "FVU sparse" in capsys.readouterr().out


@pytest.mark.usefixtures("no_pictures", "usual_handler")
def test_a_stopped_experiment_has_its_table_and_goes_on(options, out, tmp_path, monkeypatch):
    cut, arguments = tmp_path / "cut", ["experiment", "tiny", "--seeds", "1"]
    shutil.copytree(out / "vanilla" / "seed_0", cut / "vanilla" / "seed_0")
    (cut / "vanilla" / "seed_0" / "experiment.json").unlink()  # finished, but not measured
    interrupt_at(monkeypatch, "seed_0", 1)
    assert main([*arguments, "--out", str(cut), *options]) == 130
    assert [row["variant"] for row in json.loads((cut / "tiny.json").read_text())["rows"]] == ["vanilla"]
    trained, step = [], Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda self, a: trained.append(self.out.parent.name) or step(self, a))
    assert main([*arguments, "--only", "C_0", "--out", str(cut), *options]) == 0
    assert trained == ["C_0"], "its third step"
    assert mean_of(cut / "C_0" / "seed_0") == mean_of(out / "C_0" / "seed_0")
    assert [row["variant"] for row in json.loads((cut / "tiny.json").read_text())["rows"]] == ["vanilla", "C_0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--clt.dtype", "bf16"], "clt.dtype ('fp32' there, now 'bf16')"),
        (["tiny", "--steps", "4"], "steps: expected the 3 that"),
        (["tiny", "--only", "C_5"], "only: expected labels of experiment tiny, vanilla, C_0, C_4; got C_5"),
        (["tiny", "--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["tiny", "--seed", "5"], "seed: expected none in an experiment"),
        (
            ["tiny", "--connections.per-latent", "2", "--connections.start-per-latent", "3"],
            "variant C_4: connections.start_per_latent: expected",
        ),
        (["tinny"], "experiment: expected one of demonstration, width"),
        (["--seeds", "2"], "experiment: expected the name of one before all options"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(
    out, options, arguments, message, monkeypatch, capsys
):
    monkeypatch.setattr(LanguageModel, "load", lambda *a, **k: pytest.fail("the language model was loaded"))
    options = [*options, "--out", str(out)] if arguments[0] == "tiny" else []
    assert main(["experiment", *arguments[:1], *options, *arguments[1:]]) == 2
    assert message in one_line(capsys)


def test_the_list_names_every_experiment_and_its_question(capsys):
    assert main(["experiment", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and e.question in out for name, e in registry.EXPERIMENTS.items())
    assert main(["experiment", "tiny", "--list"]) == 0
    assert "C_4      --connections.per-latent 4\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", registry.EXPERIMENTS)
def test_every_experiment_can_be_planned(name):
    experiment = registry.EXPERIMENTS[name]
    plan = conduct.planned(experiment, experiment.config(), seeds=2)
    assert len({config.out for config in plan.values()}) == len(plan) == 2 * len(experiment.variants)
    assert all(re.fullmatch(r"[\w.-]+", label) for label, _ in plan)
    assert set(experiment.columns) <= set(COLUMNS)
    assert len(set(plan.values())) == len(plan)


def test_an_experiment_whose_references_are_missing_is_refused():
    with pytest.raises(ValueError, match="variants: expected labels, each once, and references among them"):
        Experiment("e", "?", (Variant("a", "", "b"),), ())
    with pytest.raises(ConfigError, match="variant a: clt.active: expected at most clt.latents = 8, got 32"):
        Variant("a", "--clt.latents 8").of(TINY.config())
    with pytest.raises(ValueError, match="variant a: expected options of sparseclt train, got --clt.width 8"):
        Variant("a", "--clt.width 8").of(TINY.config())


def test_a_run_that_another_experiment_has_finished_is_shared(out, options, monkeypatch, tmp_path):
    shutil.copytree(out, tmp_path / "tiny")
    other = Experiment("other", "?", (Variant("again", "--connections.per-latent 4"),), ("splitting",), TINY.base)
    monkeypatch.setitem(registry.EXPERIMENTS, "other", other)
    assert main(["experiment", "other", "--seeds", "3", "--out", str(tmp_path / "other"), *options]) == 0
    assert [path.name for path in sorted((tmp_path / "other" / "again").iterdir())] == ["seed_2"]
    (row,) = json.loads((tmp_path / "other" / "other.json").read_text())["rows"]
    assert main(["experiment", "other", "--seeds", "2", "--out", str(tmp_path / "third"), *options]) == 0
    assert [path.name for path in (tmp_path / "third").iterdir() if path.is_dir()] == []
    of_other = [mean_of(tmp_path / "tiny" / "C_4" / f"seed_{seed}")["splitting"] for seed in (0, 1)]
    assert row["columns"]["splitting"]["values"][:2] == of_other and row["seeds"] == [0, 1, 2]
