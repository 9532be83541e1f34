"""Weak scaling: a training step on several processes with as many times the work of one, ours and dense.

    python benchmarks/several_ranks.py [--ranks 2] [--steps 6]

Each process has one thread and speaks by gloo. "latents": the CLT is shared and has n F latents; "data": the batch is
shared and has n N tokens. The dense baseline is a vanilla-mode CLT in plain torch, under DistributedDataParallel and
under FSDP2 (`fully_shard`, one unit per module), which share the batch. Efficiency is the time of a step on one rank
over that on n: 1 if sending and waiting took no time. Only ratios are printed: processes share caches and memory, so
that times on n cores of one machine say little of n machines.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Inputs
from typing import Any

import torch
import torch.distributed as dist
from baselines import dense_topk, scatter
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import linear
from torch.nn.parallel import DistributedDataParallel

from sparseclt.config import (
    CLTConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from sparseclt.model.activations import Activations
from sparseclt.model.shape import ModelShape
from sparseclt.training.trainer import Trainer

L, D, F, K, C, B, S = 4, 256, 2048, 16, 8, 4, 64
WARM_UP = 2
NEVER = 10**9
Step = Callable[[], object]


def batch(rows: int) -> Activations:
    def layers(*last: int) -> list[Tensor]:
        return [torch.randn(rows, S, *last) for _ in range(L)]

    tokens = torch.zeros(rows, S, dtype=torch.int64)
    scale = [1 + torch.rand(rows, S) for _ in range(L)]
    return Activations(tokens, layers(D)[0], layers(D), scale, layers(D), [a / L for a in layers(D)])


def ours(mode: str, latents: int, data: int) -> tuple[Step, Callable[[], int]]:
    """A step of the trainer, and the bytes that this rank has sent so far."""
    config = TrainConfig(
        out="unused", batch_rows=B * data, device="cpu", steps=NEVER, logging=LoggingConfig(progress=False),
        clt=CLTConfig(latents=F * latents, active=K), data=DataConfig(row_tokens=S),
        connections=ConnectionConfig("random" if mode == "both" else "none", C),
        loss=LossConfig(sparse_start_share=0.0, sparse_ramp_share=0.0),
        optimizer=OptimizerConfig(learning_rate=0.0), parallel=ParallelConfig(latents=latents, data=data),
    )  # fmt: skip
    shape = ModelShape(layers=L, d_model=D, heads=1, vocab=1)
    model: Any = Inputs(shape=shape, tokenizer=None, dtype=torch.float32, digest=str)
    trainer = Trainer(config, language_model=model, rows=torch.zeros(B * data, S, dtype=torch.int64))
    activations, r = batch(B), trainer.ranks
    groups = (r.latents, r.data, r.world)
    return lambda: trainer.train_step(activations), lambda: sum(group.sent.total() for group in groups)


class DenseModule(nn.Module):
    """The latents of one layer, and what they write to it and to all later ones."""

    def __init__(self, layer: int):
        super().__init__()
        self.W_enc = nn.Parameter(torch.randn(F, D) / D**0.5)
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.W_dec = nn.Parameter(torch.zeros(F, (L - layer) * D))

    def forward(self, x: Tensor) -> Tensor:
        return scatter(*dense_topk(linear(x, self.W_enc, self.b_enc), K), F) @ self.W_dec


class DenseCLT(nn.Module):
    """The sum of FVUs of a vanilla-mode CLT."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DenseModule(layer) for layer in range(L))

    def forward(self, inputs: list[Tensor], targets: list[Tensor]) -> Tensor:
        written = [module(x) for module, x in zip(self.layers, inputs, strict=True)]
        total = inputs[0].new_zeros(())
        for layer, y in enumerate(targets):
            found = sum(written[u][:, (layer - u) * D : (layer - u + 1) * D] for u in range(layer + 1))
            total = total + (y - found).square().sum() / (y - y.mean(0)).square().sum()
        return total


def dense(wrap: Callable[[DenseCLT], nn.Module]) -> Step:
    model = wrap(DenseCLT())
    adam = torch.optim.Adam(model.parameters(), lr=0.0)
    activations = batch(B)
    inputs, targets = ([t.flatten(0, 1) for t in of] for of in (activations.x, activations.mlp_out))

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        model(inputs, targets).backward()
        adam.step()

    return step


def sharded(model: DenseCLT) -> nn.Module:
    for module in model.layers:
        fully_shard(module)
    fully_shard(model)
    return model


CONTENDERS = (
    "ours, vanilla mode, latents", "ours, vanilla mode, data", "ours, both modes, latents", "ours, both modes, data",
    "dense, vanilla mode, DDP", "dense, vanilla mode, FSDP2",
)  # fmt: skip


def make(contender: str, n: int) -> tuple[Step, Callable[[], int] | None]:
    kind, mode, way = contender.split(", ")
    if kind == "ours":
        return ours(mode.split()[0], n if way == "latents" else 1, n if way == "data" else 1)
    if n == 1:
        return dense(lambda model: model), None
    return dense(sharded if way == "FSDP2" else DistributedDataParallel), None


def measure(rank: int, n: int, contender: str, steps: int, folder: str) -> None:
    """On each of n processes: the median time of a step of the slowest one, and the bytes that a rank sends in it."""
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n)
    step, sent = make(contender, n)
    seconds = []
    for number in range(WARM_UP + steps):
        before = sent() if sent else 0
        dist.barrier()
        start = time.perf_counter()
        step()
        took = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(took, dist.ReduceOp.MAX)
        if number >= WARM_UP:
            seconds.append(took.item())
    if rank == 0:
        found = {"seconds": statistics.median(seconds), "sent": sent() - before if sent else None}
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(n: int, contender: str, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (n, contender, steps, folder), nprocs=n)
        found: dict[str, Any] = json.loads(Path(folder, "found.json").read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    n = options.ranks
    print(
        f"L {L}, D {D}, F {F}, K {K}, C {C}, N {B * S} per rank; {n} ranks against 1, median of {options.steps} steps\n"
    )
    print(f"| contender | time on {n} / time on 1 | efficiency | sent by a rank in a step, MiB |")
    print("| --- | ---: | ---: | ---: |", flush=True)
    for contender in CONTENDERS:
        one = run(1, contender, options.steps)["seconds"]
        try:
            many = run(n, contender, options.steps)
        except Exception as error:  # what gloo, or a torch without it, cannot do
            print(f"| {contender} | not run: {str(error).strip().splitlines()[-1]} | | |", flush=True)
            continue
        ratio, sent = many["seconds"] / one, "" if many["sent"] is None else f"{many['sent'] / 2**20:.2f}"
        print(f"| {contender} | {ratio:.2f} | {1 / ratio:.2f} | {sent} |", flush=True)


if __name__ == "__main__":
    main()
