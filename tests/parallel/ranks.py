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
        context = multiprocessing.get_context("forkserver")
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

    def close(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send_bytes(b"")
            process.join(5)
            process.kill()


def _work(pipe: Any, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        job = pipe.recv_bytes()
        if not job:
            return
        try:
            n, store, function, args = pickle.loads(job)
            timeout = timedelta(seconds=TIMEOUT)
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n, timeout=timeout)
            dist.barrier()  # a rank that is done at once must not close connections that others are making
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        pipe.send_bytes(pickle.dumps(answer))
