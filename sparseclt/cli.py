"""The `sparseclt` command."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from sparseclt.config import TrainConfig
from sparseclt.model.shape import ModelShape


def _train(config: TrainConfig) -> None:
    from sparseclt import runs as pipeline
    from sparseclt.evaluation import report

    print(report.evaluation_table(pipeline.train(config).to_dict()))
    print(f"\nRun directory: {config.out}")


def _resume(run: Path) -> None:
    from sparseclt import runs as pipeline
    from sparseclt.evaluation import report
    from sparseclt.training.trainer import Trainer

    trainer = Trainer.from_run(run)
    trainer.fit(resume=run)
    print(report.evaluation_table(pipeline.evaluate_run(run, trainer.language_model).to_dict()))


def _repeat(run: Path, out: Path) -> None:
    from dataclasses import replace

    from sparseclt.training.run_directory import read_config

    _train(replace(read_config(run), out=str(out)))


def _evaluate(run: Path) -> None:
    from sparseclt import runs as pipeline
    from sparseclt.evaluation import report

    print(report.evaluation_table(pipeline.evaluate_run(run).to_dict()))


def _sweep(config: TrainConfig, connections: tuple[int, ...]) -> None:
    from sparseclt import runs as pipeline
    from sparseclt.evaluation import report

    print(report.sweep_table(pipeline.sweep(config, connections)))
    print(f"\nRun directories: {config.out}")


def _plan(config: TrainConfig, shape: ModelShape, memory_gib: float | None) -> int:
    from sparseclt.devices import resolve
    from sparseclt.training import memory

    if not shape.layers:
        shape = memory.shape_of(config.model.path, config.model.layers)
    available = memory.available_bytes(resolve(config.device)) if memory_gib is None else int(memory_gib * memory.GiB)
    plan = memory.make_plan(config, shape, available)
    print(memory.table(plan))
    if available is not None and not plan.fits:
        print(memory.advice_text(config, shape, available))
    return 0 if plan.fits else 1


def _selftest(device: str, backends: tuple[str, ...]) -> int:
    import torch

    from sparseclt.devices import resolve
    from sparseclt.ops import selftest

    device = str(resolve(device))
    names = backends or tuple(
        name for name in ("torch", "numba", "triton") if selftest.runnable(name, torch.float32, device)
    )
    rows = selftest.selftest(device, names)
    print(selftest.table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"\n{device}, {', '.join(names)}: {len(rows) - failed} passed, {failed} failed")
    return 1 if failed else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point: 0 on success, 1 when the self-test fails, 2 on bad input, with one line on standard error that says
    what was wrong."""
    import tyro

    Config = Annotated[TrainConfig, tyro.conf.arg(name="")]

    def train(config: Config = TrainConfig()) -> None:  # noqa: B008
        """Train a sparsely-connected CLT, evaluate it on held-out text, write tables and plots."""
        _train(config)

    def resume(run: tyro.conf.Positional[Path]) -> None:
        """Continue a run that was cut off, exactly where its newest checkpoint stands.

        Args:
            run: The run directory.
        """
        _resume(run)

    def repeat(run: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> None:
        """Train again what a run directory says, into a new one.

        Args:
            run: The run directory to repeat.
            out: The new run directory.
        """
        _repeat(run, out)

    def evaluate(run: tyro.conf.Positional[Path]) -> None:
        """Evaluate a finished run on its held-out text and print the table.

        Args:
            run: The run directory.
        """
        _evaluate(run)

    def sweep(config: Config = TrainConfig(out="runs/sweep"), connections: tuple[int, ...] = (8, 16, 32, 64)) -> None:  # noqa: B008
        """Train a vanilla baseline and one run for each number of connections; FVU against C.

        Args:
            config: The runs' configuration.
            connections: The numbers of connections (C).
        """
        _sweep(config, connections)

    def plan(
        config: Config = TrainConfig(),  # noqa: B008
        shape: ModelShape = ModelShape(),  # noqa: B008
        memory_gib: float | None = None,
    ) -> int:
        """What a training run would hold in memory, term by term, and whether it fits; exit status 1 where not.

        Args:
            config: The run's configuration.
            shape: The language model's, where it is not at hand.
            memory_gib: Memory that there is, in GiB; None: what is free on the device.
        """
        return _plan(config, shape, memory_gib)

    def selftest(device: str = "auto", backends: tuple[str, ...] = ()) -> int:
        """Compare every op, dtype and backend, and each gradient, with float64 on this machine; print the errors.

        Args:
            device: 'cpu', 'cuda', ...; auto: CUDA where there is one.
            backends: Backends by name; none: all that run on the device.
        """
        return _selftest(device, backends)

    def bench_report(file: tyro.conf.Positional[Path], out: Path = Path("docs/benchmarks.md")) -> None:
        """Turn what `pytest benchmarks/ --benchmark-json FILE` wrote into a Markdown page with plots.

        Args:
            file: The JSON file.
            out: The page; its plots are written beside it.
        """
        from sparseclt import bench_report

        print(bench_report.bench_report(file, out))

    commands: dict[str, Callable[..., int | None]] = {
        "train": train,
        "resume": resume,
        "repeat": repeat,
        "eval": evaluate,
        "sweep": sweep,
        "plan": plan,
        "bench-report": bench_report,
        "selftest": selftest,
    }
    try:
        status: int | None = tyro.extras.subcommand_cli_from_dict(
            commands, prog="sparseclt", description="Sparsely-connected cross-layer transcoders.", args=arguments
        )
    except (ValueError, TypeError) as error:
        print(f"sparseclt: {error}", file=sys.stderr)
        return 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
