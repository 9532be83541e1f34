"""Disks that are full, read-only or gone: one error that names the file, and the newest whole checkpoint loads."""

import errno
import os
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from faults import child, fail_at, refuse
from tiny_runs import mark, save, write

from sparseclt import cli, commands
from sparseclt.evaluation.plots import fvu_against_c
from sparseclt.storage.checkpoint import latest
from sparseclt.storage.directories import atomic_directory, remove_directory
from sparseclt.storage.json_files import replace_file
from sparseclt.storage.safetensors_stream import save_file
from sparseclt.training.loggers import JsonLinesLogger


@pytest.fixture
def template(tmp_path):
    """A run with checkpoints 1 and 2; saves replace the second one and remove the first."""
    for step in (1, 2):
        write(tmp_path / "template", step, 1)
    return tmp_path / "template"


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_a_full_disk_at_any_call(template, tmp_path):
    found, full = [], refuse(errno.ENOSPC)
    for number in range(2, 1000):  # the first is to make a directory that is there already
        run = Path(shutil.copytree(template, tmp_path / f"run_{number}"))
        code, message = child(lambda n=number, run=run: (fail_at(n, full), save(run, 2, 9)))
        found.append(mark(run))
        if code == 0:
            break
        assert re.fullmatch(
            rf"OSError: \[Errno 28\] No space left on device: '{run}/checkpoints/step_.+'", message
        ) or (message == f"OSError: [Errno 28] No space left on device: '{run}/checkpoints'")
        if found[-1] == 1:
            assert names(run) == ["step_00000001", "step_00000002"]  # nothing half-written stays
        save(run, 2, 10)
        assert mark(run) == 10 and names(run) == ["step_00000002"]
        shutil.rmtree(run)
    assert found == sorted(found) and set(found) == {1, 9} and len(found) > 40


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_everything(template, code):
    """Among other times from within a save on, when even what is half-written cannot be removed."""
    for number in (1, 2, 5, 20, 25, 26, 27):
        failed, message = child(lambda n=number: (fail_at(n, refuse(code), from_then_on=True), save(template, 2, 9)))
        assert failed and re.search(rf"{os.strerror(code)}: '{template}/checkpoints[\w/.]*'$", message), message
        assert mark(template) in (1, 9)
    save(template, 2, 10)
    assert mark(template) == 10 and names(template) == ["step_00000002"]


@pytest.mark.parametrize("limit", [0, 100, 150, 300])
def test_files_that_may_not_grow(template, limit):
    """RLIMIT_FSIZE, for real: the files of a checkpoint have between 80 and 800 bytes."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        save(template, 2, 9)

    code, message = child(limited)
    path = f"{template}/checkpoints/step_00000002.tmp/"
    assert code and re.fullmatch(rf"OSError: \[Errno 27\] File too large: '{path}[\w.]+'", message), message
    assert mark(template) == 1 and names(template) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize("writer", ["tensors", "metrics", "replaced", "picture"])
def test_other_files_that_may_not_grow(tmp_path, writer):
    file = tmp_path / "file.png"
    file.write_text("")
    work = {
        "tensors": lambda: save_file({"x": torch.zeros(99)}, file),
        "metrics": lambda: JsonLinesLogger(file).log(1, {"loss": 0.5}),
        "replaced": lambda: replace_file(file, "new"),
        "picture": lambda: fvu_against_c([{"C": 1, "fvu_sparse": 0.5}], file),
    }[writer]
    _, message = child(lambda: (resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)), work()))
    assert re.fullmatch(rf"OSError: \[Errno 27\] File too large: '{file}(\.tmp)?'", message), message
    assert os.listdir(tmp_path) == ["file.png"] and file.read_text() == ""


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="only root may mount")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"this machine does not let root mount: {mounted.stderr}")
    try:
        save(disk, 1, 1)
        (disk / "others").write_bytes(b"x" * (shutil.disk_usage(disk).free - 4 * 4096))
        with pytest.raises(OSError, match=f"No space left on device: '{disk}/checkpoints/step_00000002.tmp/"):
            save(disk, 2, 9)
        assert mark(disk) == 1 and names(disk) == ["step_00000001"]
        (disk / "others").unlink()
        save(disk, 2, 10)
        assert mark(disk) == 10
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_run_directory_that_vanishes_during_a_save(template):
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{template}/checkpoints/step_00000003.tmp")):
        with atomic_directory(template / "checkpoints" / "step_00000003") as directory:
            shutil.rmtree(template)
            save_file({"x": torch.zeros(1)}, directory / "x.safetensors")
    assert not template.exists() and latest(template) is None


def test_a_directory_of_other_files_and_a_mount_point_are_never_replaced(tmp_path, monkeypatch):
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis holds files, but no manifest.json: expected an absent or empty"):
        with atomic_directory(thesis):
            pass
    assert os.listdir(thesis) == ["thesis.tex"]
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "disk")
    with pytest.raises(ValueError, match="disk is a mount point, .*: choose a directory inside it"):
        with atomic_directory(tmp_path / "disk"):
            pass
    assert os.listdir(tmp_path) == ["thesis"]


def test_removing_takes_what_a_crash_left_beside(tmp_path):
    save(tmp_path, 1, 1)
    path = latest(tmp_path)
    shutil.copytree(path, path.with_name(f"{path.name}.old"))
    remove_directory(path)
    assert names(tmp_path) == []


def test_the_command_says_it_in_one_line(monkeypatch, capsys):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/disk/run/metrics.jsonl")

    monkeypatch.setattr(commands, "selftest", full)
    assert cli.main(["selftest"]) == 2
    assert capsys.readouterr().err == "sparseclt: [Errno 28] No space left on device: '/disk/run/metrics.jsonl'\n"
