"""The `sparseclt` command."""

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import tyro

from sparseclt.experiments.experiment import refusal
from sparseclt.experiments.registry import find
from sparseclt.flags import COMMANDS, Config, Run, Work, experiment, resume
from sparseclt.storage.run_config import read_config

ON_SEVERAL_PROCESSES = ("train", "resume", "repeat")


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns 0 on success; 1 if the self-test fails or a planned run does not fit; 2 on bad input or when a disk or the
    network refuses something, after a message on standard error; 130 or 143 after SIGINT or SIGTERM.
    """
    try:
        with _short_warnings():
            arguments = sys.argv[1:] if arguments is None else arguments
            _check_processes(arguments)
            return _parse(arguments)() or 0
    except (ValueError, TypeError) as error:
        print(f"sparseclt: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a directory that may not be written: the error names it
        print(f"sparseclt: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:  # that of a training run has written a checkpoint, and says so
        print(f"sparseclt: {stop or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "exit_status", 130)


def _check_processes(arguments: list[str]) -> None:
    processes, command = os.environ.get("WORLD_SIZE", "1"), next(iter(arguments), "")
    if processes != "1" and command in COMMANDS and command not in ON_SEVERAL_PROCESSES:
        raise ValueError(
            f"{command}: expected a single process, got {processes}; only train, resume and repeat run on several"
        )


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Our own warnings as one line, without the line of code that they come from."""
    usual, ours = warnings.formatwarning, str(Path(__file__).parent)

    def short(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        own = filename.startswith(ours)
        return f"sparseclt: {message}\n" if own else usual(message, category, filename, lineno, line)

    warnings.formatwarning = short
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _parse(arguments: list[str]) -> Work:
    """The work that the arguments ask for. tyro frames and wraps the errors of a configuration; they are raised as
    they are instead."""
    messages = io.StringIO()
    known = COMMANDS | {"resume": _resume_of(arguments), "experiment": _experiment_of(arguments)}
    try:
        with redirect_stderr(messages):
            work: Work = tyro.extras.subcommand_cli_from_dict(
                known, prog="sparseclt", description="Sparsely-connected cross-layer transcoders.", args=arguments
            )
    except SystemExit as stop:
        if (error := refusal(stop)) is not None:
            raise error from None
        sys.stderr.write(messages.getvalue())
        raise
    sys.stderr.write(messages.getvalue())
    return work


def _resume_of(arguments: list[str]) -> Callable[..., Work]:
    """`resume` with the configuration of the run that is named first as its defaults."""
    if arguments[:1] != ["resume"] or len(arguments) < 2 or arguments[1] in ("-h", "--help"):
        return resume
    if arguments[1].startswith("-"):
        raise ValueError(f"resume: expected the run directory before all options, got {arguments[1]}")
    stored = read_config(arguments[1])

    def of_run(run: Run, config: Config = stored, checkpoint: Path | None = None) -> Work:
        return resume(run, config, checkpoint)

    of_run.__doc__ = resume.__doc__
    return of_run


def _experiment_of(arguments: list[str]) -> Callable[..., Work]:
    """`experiment` with the configuration of the experiment that is named first as its defaults."""
    if arguments[:1] != ["experiment"] or len(arguments) < 2 or arguments[1].startswith("-"):
        if arguments[:1] == ["experiment"] and not {"--list", "-h", "--help"} & {*arguments}:
            raise ValueError("experiment: expected the name of one before all options; --list shows them")
        return experiment
    named = find(arguments[1]).config()

    def of_name(
        name: tyro.conf.Positional[str],
        seeds: int = 3,
        only: tuple[str, ...] = (),
        list: bool = False,
        config: Config = named,
    ) -> Work:
        return experiment(name, seeds, only, list, config)

    of_name.__doc__ = experiment.__doc__
    return of_name


if __name__ == "__main__":
    sys.exit(main())
