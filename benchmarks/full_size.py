"""Train a CLT of the size of GPT-2 small (L 12, D 768, F 24,576, K 32: 1.7 G weights) for some steps on a CPU, and
compare its memory with its plan.

    python benchmarks/full_size.py

The language model has GPT-2's architecture and random weights. Tokens are random, and so are connections unless
`--select` is given (selection takes 60 TFLOP, and hardly any memory).
"""

import argparse
import resource
import threading
import time

import torch

from sparseclt.config import (
    CLTConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.shape import ModelShape
from sparseclt.training.memory import GiB, dense_plan, make_plan, table
from sparseclt.training.trainer import Trainer

ROW = 128
LEARNING_RATE = 1e-4  # wide vectors and few steps: every weight moves by about this much in a step


def resident() -> int:
    """Bytes of the process' resident set."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize()


class Peak:
    """The largest resident set since the last `take`, sampled every 10 ms."""

    def __init__(self) -> None:
        self.bytes = 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.bytes = max(self.bytes, resident())
            time.sleep(0.01)

    def take(self) -> int:
        peak, self.bytes = self.bytes, 0
        return peak


def gpt2(layers: int, d_model: int) -> LanguageModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=d_model, n_head=max(1, d_model // 64))
    return LanguageModel.from_hf(GPT2LMHeadModel(config), None, name="gpt2")


def random_connections(trainer: Trainer, C: int) -> None:
    for module in trainer.clt:
        if module.upstream:
            # One id out of each of C equal stretches: distinct without a sort.
            stretch = module.upstream // C
            ids = torch.randint(stretch, (module.latents, C), dtype=torch.int32)
            module.connect(ids + torch.arange(C, dtype=torch.int32) * stretch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(layers=12, d_model=768, latents=24_576, active=32, connections=32, rows=2).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--vanilla-steps", type=int, default=20)
    parser.add_argument("--both-steps", type=int, default=5)
    parser.add_argument("--select", action="store_true", help="choose the most important connections")
    parser.add_argument("--limit", type=float, default=14, help="GiB")
    a = parser.parse_args()
    steps = a.vanilla_steps + a.both_steps
    begin = a.vanilla_steps / steps
    config = TrainConfig(
        out="unused", device="cpu", steps=steps, batch_rows=a.rows, data=DataConfig(row_tokens=ROW),
        clt=CLTConfig(active_ratio=1.0, latents=a.latents, active=a.active), logging=LoggingConfig(progress=False),
        loss=LossConfig(sparse_start_share=begin, sparse_ramp_share=0.0),
        connections=ConnectionConfig(per_latent=a.connections, refresh_steps=10**9, recent_tokens=2048),
        optimizer=OptimizerConfig(state="8bit", rows="touched", learning_rate=LEARNING_RATE, warmup_share=0.2),
    )  # fmt: skip
    limit = int(a.limit * GiB)
    model = gpt2(a.layers, a.d_model)
    size = sum(p.numel() for p in model.bridge.original_model.parameters())
    shape = ModelShape(a.layers, a.d_model, parameters=size)
    plan = make_plan(config, shape, limit)
    print(table(plan), "\n")
    dense = dense_plan(config, shape, limit)
    print(f"the dense baseline: {dense.peak / GiB:,.0f} GiB: {'fits' if dense.fits else 'refused'}\n", flush=True)
    peak, start = Peak(), resident()
    print(f"before the CLT: {start / GiB:.2f} GiB, including the model, {4 * size / GiB:.2f}", flush=True)
    vocab = model.shape.vocab
    rows = torch.randint(vocab, (64, ROW), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    trainer = Trainer(config, language_model=model, rows=rows)
    peaks: dict[str, int] = {}
    for step in range(steps):
        mode = "vanilla" if step < a.vanilla_steps else "both"
        if step == a.vanilla_steps and not a.select:
            random_connections(trainer, a.connections)  # the policy then leaves them as they are
        began = time.perf_counter()
        metrics = trainer.train_step(trainer.batches.capture(next(trainer.batches.stream_at(trainer.step))))
        seconds = time.perf_counter() - began
        peaks[mode] = max(peaks.get(mode, 0), peak.take())
        shown = " ".join(f"{name} {metrics[name]:.4f}" for name in ("fvu_vanilla", "fvu_sparse") if name in metrics)
        print(f"step {step + 1:3} {mode:8} {shown}  {a.rows * ROW / seconds:.1f} tokens/s", flush=True)
    outside = start - 4 * size
    for mode, measured in peaks.items():
        print(f"peak resident memory, {mode}: {measured / GiB:.2f} GiB (limit {a.limit:g})")
    measured = max(peaks.values()) - outside
    print(f"planned {plan.peak / GiB:.2f} GiB, measured without Python and its libraries {measured / GiB:.2f} GiB")


if __name__ == "__main__":
    main()
