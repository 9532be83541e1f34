"""A process killed at any call of a save: a whole checkpoint is found, and the next save works."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import changing_calls, child, die, fail_at, needs_strace, strace
from tiny_runs import mark, save, write

from sparseclt.storage.checkpoint import latest, load_state, prune, save_state
from sparseclt.storage.directories import atomic_directory
from sparseclt.storage.json_files import replace_file

KILLED = -9


@pytest.fixture
def empty(tmp_path):
    """A run without a checkpoint, the step that is to be saved, and whose checkpoints may be found afterwards."""
    (tmp_path / "template").mkdir()
    return tmp_path / "template", 2, {None, 9}


@pytest.fixture
def full(tmp_path):
    """Likewise a run with two checkpoints: the newer one is replaced, the older one removed."""
    for step in (1, 2):
        write(tmp_path / "template", step, 1)
    return tmp_path / "template", 2, {1, 9}


def survive(case, number: int, attempt) -> tuple[int, int | None]:
    """Let `attempt(work)` run a save in a process that may die, and look at what it left; then save again.

    Returns the exit code and whose checkpoint was found.
    """
    template, step, allowed = case
    run = Path(shutil.copytree(template, template.with_name(f"run_{number}")))
    code, message = attempt(partial(save, run, step, 9))
    assert code in (0, KILLED), message
    found = mark(run)
    assert found in allowed if code else found == 9
    save(run, step, 10)
    assert mark(run) == 10
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    shutil.rmtree(run)
    return code, found


def kill_at_every_call(case) -> int:
    """Returns the number of calls."""
    found = set()
    for number in range(1, 1000):
        code, whose = survive(case, number, lambda work, n=number: child(lambda: (fail_at(n, die), work())))
        found.add(whose)
        if code == 0:
            break
    assert code == 0 and found == case[2]
    return number


def test_a_first_save_killed_at_any_call(empty):
    assert kill_at_every_call(empty) > 20


def test_a_save_that_replaces_and_removes_killed_at_any_call(full):
    assert kill_at_every_call(full) > 40


@needs_strace
def test_a_save_that_replaces_and_removes_killed_at_any_system_call(full, tmp_path):
    run = Path(shutil.copytree(full[0], tmp_path / "run"))
    calls = changing_calls(partial(save, run, 2, 9), tmp_path)
    assert len(calls) > 40
    found = set()
    for number, call in enumerate(calls):
        kill = ["-e", f"inject={call.replace(':', ':signal=KILL:')}"]
        code, whose = survive(full, number, lambda work, kill=kill: strace(work, kill, tmp_path))
        assert code == KILLED, call
        found.add(whose)
    assert found == full[2]


def test_killed_while_a_file_is_replaced(tmp_path):
    file, number, code = tmp_path / "config.json", 0, KILLED
    while code == KILLED:
        number += 1
        file.write_text("old")
        code, message = child(lambda n=number: (fail_at(n, die), replace_file(file, "new")))
        assert file.read_text() in ("old", "new")
    assert code == 0 and number > 4 and file.read_text() == "new", message


def test_killed_while_old_checkpoints_are_removed(tmp_path):
    """What is left of an old checkpoint is never taken for whole, even if the newest one is damaged later."""
    for number in range(1, 20):
        run = tmp_path / f"run_{number}"
        for step in (1, 2, 3):
            with atomic_directory(run / "checkpoints" / f"step_{step:08d}") as directory:
                save_state(directory, {"x": torch.tensor([float(step)])}, {"mark": step})
        code, message = child(lambda n=number, run=run: (fail_at(n, die), prune(run, keep=1)))
        left = sorted((run / "checkpoints").iterdir())
        while path := latest(run):
            load_state(path)
            path.rename(path.with_suffix(".damaged"))
        if code == 0:
            break
    assert code == 0 and number > 6 and [path.name for path in left] == ["step_00000003"], message
