"""Processes that die, and disks that refuse, at a chosen call of the operating system that changes a file.

`fail_at` counts such calls within Python: opening for writing, each write and fsync, mkdir, rename, remove, rmdir.
`strace` does the same from outside and misses none.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir"}
SYSCALLS = (
    "open", "openat", "creat", "write", "pwrite64", "writev", "ftruncate", "fsync", "fdatasync", "mkdir", "mkdirat",
    "rename", "renameat", "renameat2", "link", "unlink", "unlinkat", "rmdir",
)  # fmt: skip


def die(*paths: str) -> None:
    """The process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def child(work: Callable[[], object]) -> tuple[int, str]:
    """Run `work` in a fork of this process. Returns (exit code or minus the signal, the error that it raised)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        _work_and_exit(work, writing)
    os.close(writing)
    return wait(pid, reading)


def _work_and_exit(work: Callable[[], object], writing: int) -> None:
    status = 1
    try:
        work()
        status = 0
    except BaseException as error:
        os.write(writing, f"{type(error).__name__}: {error}".encode())
    finally:
        os._exit(status)


def wait(pid: int, reading: int) -> tuple[int, str]:
    with open(reading, "rb") as pipe:
        message = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), message


def refuse(error: int) -> Callable[..., None]:
    """The call fails, and its error names the paths that it was given: a write or an fsync was given none."""

    def action(*paths: str) -> None:
        raise OSError(error, os.strerror(error), *paths[:1])

    return action


def fail_at(number: int, action: Callable[..., object], *, from_then_on: bool = False) -> None:
    """Do `action(*paths)` in place of the n-th change, counted from 1, and of all later ones if `from_then_on`.

    To be called in a fork: it cannot be undone.
    """
    done = 0

    def count(*paths: str) -> None:
        nonlocal done
        done += 1
        if done == number or from_then_on and done > number:
            action(*paths)

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event in CHANGES or writes:
            count(str(arguments[0]))

    class Torn(io.FileIO):
        def write(self, content):
            # Half of it is on the disk when the process dies.
            if done + 1 == number:
                super().write(bytes(content)[: len(content) // 2])
            count()
            return super().write(content)

    opened = io.open

    def torn_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **rest):
        if "w" not in mode:
            return opened(file, mode, buffering, encoding, errors, newline, **rest)
        raw = io.BufferedWriter(Torn(file, "w"))
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding, errors, newline)

    fsync = os.fsync

    def counted_fsync(descriptor: int) -> None:
        count()
        fsync(descriptor)

    io.open, os.fsync = torn_open, counted_fsync
    sys.addaudithook(hook)


def changing_calls(work: Callable[[], object], folder: Path) -> list[str]:
    """The system calls of `work` that change files, each as strace counts it: "rename:when=2" is the second rename."""
    code, message = strace(work, ["-e", f"trace={','.join(f'?{name}' for name in SYSCALLS)}"], folder)
    assert code == 0, message
    seen: Counter[str] = Counter()
    calls = []
    for line in (folder / "trace").read_text().splitlines():
        name = line.partition("(")[0]
        seen[name] += 1
        if name in SYSCALLS and "O_RDONLY" not in line:
            calls.append(f"{name}:when={seen[name]}")
    return calls


def strace(work: Callable[[], object], options: list[str], folder: Path) -> tuple[int, str]:
    """Run `work` in a fork of this process with strace attached; returns as `child` does."""
    reading, writing = os.pipe()
    ready, go = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(go)
        os.read(ready, 1)
        _work_and_exit(work, writing)
    for end in (writing, ready):
        os.close(end)
    command = ["strace", "-p", str(pid), "-o", str(folder / "trace"), *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracer.stderr is not None
    line = tracer.stderr.readline()
    os.close(go)  # whether attached or not, so that the child ends
    result = wait(pid, reading)
    tracer.communicate()
    if "attached" not in line:
        pytest.skip(f"strace may not trace on this machine: {line.strip()}")
    return result


needs_strace = pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
