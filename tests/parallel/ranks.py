"""Processes that stand for ranks. They are started once, from a server that has imported torch, and are given functions
to run together."""

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

MOST = 4
TIMEOUT = 40  # seconds that a collective may wait


class Ranks:
    """`run(n, function, *args)`: `function(*args)` on n ranks with a process group of their own; the results by rank.
    Functions and arguments must be importable by name, or picklable."""

    def __init__(self):
        context = self.context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["preloaded"])
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server knows no other way to `preloaded`
        self.pipes, self.processes = [], []
        for rank in range(MOST):
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there, rank), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        if path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path

    def run(self, n: int, function: Any, *args: Any) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes[:n]:
                pipe.send_bytes(pickle.dumps((n, str(Path(folder) / "store"), function, args)))
            answers = [pickle.loads(pipe.recv_bytes()) for pipe in self.pipes[:n]]
        failed = [f"rank {rank}: {answer}" for rank, (good, answer) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def once(self, n: int, function: Any, *args: Any) -> list[int]:
        """The same in processes of their own, which may die: their exit statuses, below 0 for a signal's number."""
        with tempfile.TemporaryDirectory() as folder:
            job = pickle.dumps((n, str(Path(folder) / "store"), function, args))
            processes = [self.context.Process(target=_one_job, args=(rank, job), daemon=True) for rank in range(n)]
            for process in processes:
                process.start()
            for process in processes:
                process.join(3 * TIMEOUT)
                process.kill()
                process.join()
        return [process.exitcode for process in processes]

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send_bytes(b"")
            process.join(5)
            process.kill()


def _one_job(rank: int, job: bytes) -> None:
    good, answer = _done(rank, job)
    if not good:
        print(answer, flush=True)  # shown by pytest if the test fails
        sys.exit(1)


def _work(pipe: Any, rank: int) -> None:
    while job := pipe.recv_bytes():
        pipe.send_bytes(pickle.dumps(_done(rank, job)))


def _done(rank: int, job: bytes) -> tuple[bool, Any]:
    """Whether a job ended well on this rank, and what it returned, or its error."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        n, store, function, args = pickle.loads(job)
        timeout = timedelta(seconds=TIMEOUT)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n, timeout=timeout)
        dist.barrier()  # a rank that is done at once must not close connections that others are making
        return True, function(*args)
    except BaseException:
        return False, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
