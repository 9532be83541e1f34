"""What each command of `sparseclt.cli` does. Heavy imports wait until a command runs."""

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparseclt.config import TrainConfig
from sparseclt.costs import Rates
from sparseclt.experiments.experiment import Experiment
from sparseclt.export import FormatName
from sparseclt.model.shape import ModelShape
from sparseclt.storage.run_config import check_trained, read_config

if TYPE_CHECKING:
    from sparseclt.training.trainer import Trainer

Split = Literal["held_out", "train"]


def train(config: TrainConfig) -> None:
    """Train, evaluate and print the table."""
    from sparseclt import runs
    from sparseclt.evaluation import report

    trainer = runs.begin(config)
    _say_grid(trainer)
    result = runs.finish(trainer)
    if result is not None:  # on the first of several ranks
        print(report.evaluation_table(result.to_dict()))
        print(f"\nRun directory: {config.out}")


def resume(run: Path, config: TrainConfig, checkpoint: Path | None) -> None:
    """Go on with a run and print its table."""
    from sparseclt import runs
    from sparseclt.evaluation import report

    trainer = runs.resume(run, config, checkpoint=checkpoint)
    _say_grid(trainer)
    if trainer.step == config.steps and trainer.ranks.first:
        print(f"{run} has done all its {config.steps} steps; --steps gives it more. It is evaluated again.\n")
    result = runs.finish(trainer)
    if result is not None:
        print(report.evaluation_table(result.to_dict()))


def _say_grid(trainer: "Trainer") -> None:
    from sparseclt.training.grid import description

    if trainer.ranks.first and not trainer.ranks.world.alone:
        print(description(trainer.ranks), flush=True)


def repeat(run: Path, out: Path) -> None:
    """Train again as run directory `run` was, into `out`."""
    check_trained(run)
    train(replace(read_config(run), out=str(out)))


def import_clt(path: Path, config: TrainConfig, input_hook: str | None) -> None:
    """Make a run of another tool's CLT and print its table."""
    from sparseclt import runs
    from sparseclt.evaluation import report

    print(report.evaluation_table(runs.import_run(path, config, input_hook).to_dict()))
    print(f"\nRun directory: {config.out}")


def evaluate(
    run: Path, device: str | None, checkpoint: Path | None, faithfulness: bool, interaction_sparsity: bool
) -> None:
    """Evaluate a run and print its table, with `faithfulness` also whether its connections matter, and with
    `interaction_sparsity` how few of them are needed."""
    from sparseclt import runs
    from sparseclt.evaluation import report

    for name, asked in (("faithfulness", faithfulness), ("interaction_sparsity", interaction_sparsity)):
        if asked and checkpoint is not None:
            raise ValueError(f"{name}: expected a finished run without --checkpoint, got {checkpoint}")
    result = runs.evaluate_run(run, device=device, checkpoint=checkpoint)
    print(report.evaluation_table(result.to_dict()))
    if faithfulness:
        print(f"\n{report.faithfulness_table(runs.faithfulness_of_run(run, device=device))}")
    if interaction_sparsity:
        print(f"\n{report.interaction_table(runs.interaction_of_run(run, device=device))}")


def sweep(config: TrainConfig, connections: tuple[int, ...], random: bool) -> None:
    """Train for each number of connections and print FVU against C."""
    from sparseclt.evaluation import report
    from sparseclt.experiments import sweeps

    print(report.sweep_table(sweeps.sweep(config, connections, random=random)))
    print(f"\nRun directories: {config.out}")


def experiments(name: str) -> None:
    """Print the experiments there are, or the variants of one."""
    from sparseclt.experiments.registry import listing

    print(listing(name))


def experiment(experiment: Experiment, config: TrainConfig, seeds: int, only: tuple[str, ...]) -> None:
    """Carry out an experiment and print its table."""
    from sparseclt.experiments.conduct import conduct

    print(conduct(experiment, config, seeds=seeds, only=only))
    print(f"\nRun directories: {config.out}")


def atlas(run: Path, out: Path | None, tokens: int | None, port: int, split: Split) -> None:
    """Write the pages of a run and, without `out`, serve them until Ctrl-C."""
    from sparseclt.atlas.build import build_atlas
    from sparseclt.atlas.server import AtlasServer

    path = build_atlas(run, out, tokens=tokens, split=split)
    print(f"Atlas: {path}")
    if out is not None:
        return
    with AtlasServer(path, port) as server, suppress(KeyboardInterrupt):
        print(f"Served at {server.url} until you press Ctrl-C.", flush=True)
        server.serve_forever()


def plan(config: TrainConfig, shape: ModelShape, memory_gib: float | None, rates: Rates) -> int:
    """Print the plan of a run, with `rates` also the time of a step; 1 if it does not fit."""
    from sparseclt.devices import resolve
    from sparseclt.training import memory, step_time

    if not shape.layers:
        shape = memory.shape_of(config.model.path, config.model.layers)
    available = memory.available_bytes(resolve(config.device)) if memory_gib is None else int(memory_gib * memory.GiB)
    plan = memory.make_plan(config, shape, available)
    print(memory.table(plan))
    if rates.given:
        print(step_time.table(config, shape, rates, available))
    if available is not None and not plan.fits:
        print(memory.advice_text(config, shape, available))
    return 0 if plan.fits else 1


def graph(run: Path, prompt: str, device: str | None, out: Path | None, options: dict[str, Any]) -> None:
    """Trace a prompt, print a summary and write the Graph JSON."""
    from sparseclt import runs
    from sparseclt.graph.explain import prompt_graph
    from sparseclt.graph.graph_json import graph_name, write_graph
    from sparseclt.graph.summary import graph_summary

    clt, model = runs.load_run(run, device=device)
    explained = prompt_graph(clt, model, prompt, **options)
    path = write_graph(explained, out or run / "graphs" / f"{graph_name(explained)}.json")
    print(f"{graph_summary(explained)}\n\nGraph: {path}")


def intervene(run: Path, prompt: str, latents: tuple[str, ...], special_tokens: bool, device: str | None) -> None:
    """Set latents on a prompt and print the change of the logits."""
    from sparseclt import runs
    from sparseclt.graph.intervention import Intervention
    from sparseclt.graph.intervention import intervene as change
    from sparseclt.graph.summary import effects_table

    wanted = [Intervention.parse(text) for text in latents]
    clt, model = runs.load_run(run, device=device)
    print(effects_table(change(clt, model, prompt, wanted, special_tokens=special_tokens)))


def export(run: Path, out: Path, format: FormatName, finetune_steps: int, device: str | None) -> None:
    """Write the CLT of a run as another tool reads it and print what that costs."""
    from sparseclt import runs

    table = runs.export_run(run, out, format=format, finetune_steps=finetune_steps, device=device)
    print(f"{table}\n\nExport: {out}")


def push(run: Path, name: str, dry_run: Path | None, private: bool, revision: str | None, token: str | None) -> None:
    """Upload the CLT of a run to the hub, or write what would be uploaded to `dry_run`."""
    from sparseclt.hub.push import push_run, write_upload

    if dry_run is not None:
        print(f"Not uploaded: {write_upload(run, name, dry_run)}")
        return
    print(push_run(run, name, private=private or None, branch=revision, token=token))


def selftest(device: str, backends: tuple[str, ...]) -> int:
    """Compare all ops with float64; 1 if one fails."""
    from sparseclt.devices import resolve
    from sparseclt.ops import selftest

    return selftest.main(str(resolve(device)), backends)
