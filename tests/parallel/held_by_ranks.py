"""What a rank holds while it trains, saves and loads, to be measured on any number of ranks."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sharded_steps import F, batch, model, own_rows, trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparseclt.config import (
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    ParallelConfig,
    TrainConfig,
)
from sparseclt.connections import exchange, over_ranks, selection
from sparseclt.model import modules
from sparseclt.model.activations import Activations, all_but_first
from sparseclt.model.shape import ModelShape
from sparseclt.parallel.select_connections import best_of_shares
from sparseclt.storage import safetensors_stream
from sparseclt.training.run_directory import Identity
from sparseclt.training.trainer import Trainer

L, B, S = 4, 2, 6
IDENTITY = Identity("model", "tokenizer", "rows")
MMAP_THRESHOLD = -3  # of mallopt, from malloc.h


def peak_of_a_run(folder: Path, parallel: dict[str, int], D: int, F: int) -> int:
    """By how many bytes this process grows while it makes a trainer, takes two steps, saves and loads."""
    libc = ctypes.CDLL(None)
    libc.mallopt(MMAP_THRESHOLD, 1 << 17)  # what is freed is given back to the system
    # Pieces of 16 or 32 MiB are little beside the decoders that need several ranks, but not beside these.
    small = 1 << 20
    with patch.object(safetensors_stream, "PIECE_BYTES", small), patch.object(selection, "SELECTION_BYTES", small):
        _run(folder, parallel, 16, 64)  # whatever is loaded when it is first needed
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = _resident("VmRSS")
        _run(folder, parallel, D, F)
        return _resident("VmHWM") - before


def _run(folder: Path, parallel: dict[str, int], D: int, F: int) -> None:
    config = TrainConfig(
        out="nowhere", batch_rows=B, clt=CLTConfig(latents=F, active=8), data=DataConfig(row_tokens=S),
        connections=ConnectionConfig("random", 4), loss=LossConfig(sparse_start_share=0.0),
        compute=ComputeConfig(backend="torch"), logging=LoggingConfig(progress=False),
        parallel=ParallelConfig(**parallel),
    )  # fmt: skip
    language_model = model("frozen")
    language_model.shape = ModelShape(layers=L, d_model=D, heads=1, vocab=1)
    t = Trainer(config, language_model=language_model, rows=torch.zeros(B, S, dtype=torch.int64))
    for _ in range(2):
        t.train_step(_activations(t.step, D))
    path = t.state.save(folder, t.step, B, IDENTITY, keep=1)
    t.state.load(path, IDENTITY)


def _activations(seed: int, D: int) -> Activations:
    g = torch.Generator().manual_seed(seed)
    x, mlp_out, attn_out, (r_0, *_) = ([torch.randn(B, S, D, generator=g) for _ in range(L)] for _ in range(4))
    tokens = torch.zeros(B, S, dtype=torch.int64)
    scale = [torch.ones(B, S) for _ in range(L)]
    return Activations(tokens, r_0, x, scale, mlp_out, attn_out, counted=all_but_first(tokens))


def _resident(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) << 10


class _Made(TorchDispatchMode):
    """The shapes of all tensors that are made. A view is none: not of a file, either."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and not function.is_view:
                self.shapes.add(tuple(tensor.shape))
        return result


@contextmanager
def _small_pieces() -> Iterator[None]:
    """Whatever is drawn, gathered or written a piece at a time, in pieces smaller than these modules."""
    pieces = ((modules, "INITIAL_BYTES"), (safetensors_stream, "PIECE_BYTES"))
    with ExitStack() as stack:
        for module, name in pieces:
            stack.enter_context(patch.object(module, name, 256))
        for module in (exchange, over_ranks):
            stack.enter_context(patch.object(module, "best_of_shares", partial(best_of_shares, tile_bytes=256)))
        yield


def made_in_a_run(folder: Path, parallel: dict[str, int], changes: dict[str, Any]) -> dict[str, Any]:
    """The shapes of the tensors that a trainer makes, at first, in some steps, while it saves and while it loads."""
    with _small_pieces(), _Made() as made:
        t = trainer("frozen", parallel, **changes)
        for step in range(5):
            t.train_step(own_rows(t, batch(step)))
        path = t.state.save(folder, t.step, B, IDENTITY, keep=1)
        t.state.load(path, IDENTITY)
    width = t.clt.architecture.model.d_model
    whole = {shape for shape in made.shapes if len(shape) > 1 and shape[0] % F == 0 and shape[-1] == width and shape[0]}
    return {"whole": whole, "seen": len(made.shapes)}
