"""What a rank holds while it trains, saves and loads, to be measured on any number of ranks."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from sharded_steps import F as FEW
from sharded_steps import batch, model, own_rows, trainer
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
from sparseclt.connections import exchange
from sparseclt.model import modules
from sparseclt.model.activations import Activations, all_but_first
from sparseclt.model.shape import ModelShape
from sparseclt.parallel.select_connections import select_connections
from sparseclt.storage import safetensors_stream
from sparseclt.training.run_directory import Identity
from sparseclt.training.trainer import Trainer

L, D, F, B, S = 4, 256, 4096, 2, 6
IDENTITY = Identity("model", "tokenizer", "rows")


def peak_of_a_run(folder: Path, parallel: dict[str, int]) -> int:
    """By how many bytes this process grows while it makes a trainer, takes two steps, saves and loads."""
    config = TrainConfig(
        out="nowhere", batch_rows=B, clt=CLTConfig(latents=F, active=8), data=DataConfig(row_tokens=S),
        connections=ConnectionConfig("random", 4), loss=LossConfig(sparse_start_share=0.0),
        compute=ComputeConfig(backend="torch"), logging=LoggingConfig(progress=False),
        parallel=ParallelConfig(**parallel),
    )  # fmt: skip
    language_model = model("frozen")
    language_model.shape = ModelShape(layers=L, d_model=D, heads=1, vocab=1)
    # Pieces of 16 MiB are little beside the decoders that need several ranks, but not beside these.
    with patch.object(safetensors_stream, "PIECE_BYTES", 1 << 20):
        before = _resident("VmRSS", reset=True)
        t = Trainer(config, language_model=language_model, rows=torch.zeros(B, S, dtype=torch.int64))
        for _ in range(2):
            t.train_step(own_rows_of(t))
        path = t.state.save(folder, t.step, B, IDENTITY, keep=1)
        t.state.load(path, IDENTITY)
        return _resident("VmHWM") - before


def own_rows_of(t: Trainer) -> Activations:
    g = torch.Generator().manual_seed(t.step)
    of_layers = [[torch.randn(B, S, D, generator=g) for _ in range(L)] for _ in range(4)]
    tokens = torch.zeros(B, S, dtype=torch.int64)
    x, mlp_out, attn_out, (r_0, *_) = of_layers
    scale = [torch.ones(B, S) for _ in range(L)]
    return Activations(tokens, r_0, x, scale, mlp_out, attn_out, counted=all_but_first(tokens))


def _resident(name: str, reset: bool = False) -> int:
    gc.collect()
    if reset:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) << 10


class _Made(TorchDispatchMode):
    """The shapes of all tensors that are made, and the size of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@contextmanager
def _small_pieces() -> Iterator[None]:
    """Whatever is drawn, gathered or written a piece at a time, in pieces smaller than these modules."""
    defaults = dict(select_connections.__kwdefaults__)
    select_connections.__kwdefaults__["tile_bytes"] = 512
    pieces = ((modules, "INITIAL_BYTES"), (exchange, "TILE_BYTES"), (safetensors_stream, "PIECE_BYTES"))
    patches = [patch.object(module, name, 512) for module, name in pieces]
    try:
        for one in patches:
            one.start()
        yield
    finally:
        for one in patches:
            one.stop()
        select_connections.__kwdefaults__.update(defaults)


def made_in_a_run(folder: Path, parallel: dict[str, int], changes: dict[str, Any]) -> dict[str, Any]:
    """The shapes of the tensors that a trainer makes, at first, in some steps, while it saves and while it loads."""
    with _small_pieces(), _Made() as made:
        t = trainer("frozen", parallel, **changes)
        for step in range(5):
            t.train_step(own_rows(t, batch(step)))
        path = t.state.save(folder, t.step, B, IDENTITY, keep=1)
        t.state.load(path, IDENTITY)
    width = t.clt.architecture.model.d_model
    whole = {
        shape for shape in made.shapes if len(shape) > 1 and shape[0] % FEW == 0 and shape[-1] == width and shape[0]
    }
    return {"whole": whole, "largest": made.largest, "seen": len(made.shapes)}
