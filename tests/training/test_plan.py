"""The plan of memory against what a training step really allocates."""

import gc
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_memory import peak_allocation
from torch._subclasses.fake_tensor import FakeTensor

from sparseclt.cli import main
from sparseclt.config import (
    ActivationConfig,
    CLTConfig,
    ComputeConfig,
    ConnectionConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    OptimizerConfig,
    TrainConfig,
)
from sparseclt.model.activations import Activations, all_but_first
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.shape import ModelShape, active_by_layer
from sparseclt.ops.scratch import SCRATCH_BYTES
from sparseclt.training import memory
from sparseclt.training.run_sizes import FORWARD, NOTED, captured_bytes
from sparseclt.training.trainer import Trainer

S = 64


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some objects mind being looked at
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor) and not isinstance(thing, FakeTensor) and thing.device.type == "cpu":
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def activations(L: int, D: int, rows: int) -> Activations:
    def layers(*last: int) -> list[torch.Tensor]:
        return [torch.randn(rows, S, *last) for _ in range(L)]

    scale = [1 + torch.rand(rows, S) for _ in range(L)]
    tokens = torch.zeros(rows, S, dtype=torch.int64)
    return Activations(tokens, layers(D)[0], layers(D), scale, layers(D), layers(D), counted=all_but_first(tokens))


def configured(
    F=4096,
    K=8,
    rows=4,
    policy="top",
    dtype="fp32",
    micro=None,
    shuffle_bytes=0,
    activation="topk",
    targets="all",
    precision=None,
    **optimizer,
) -> TrainConfig:
    return TrainConfig(
        activations=ActivationConfig(shuffle_bytes),
        out="unused", batch_rows=rows, compute=ComputeConfig(micro_batch_rows=micro, precision=precision), device="cpu",
        logging=LoggingConfig(progress=False),
        clt=CLTConfig(latents=F, active=K, dtype=dtype, activation=activation, targets=targets),
        data=DataConfig(row_tokens=S),
        loss=LossConfig(sparse_start_share=0.0),
        connections=ConnectionConfig(policy=policy, per_latent=16, refresh_steps=1000, recent_tokens=1024),
        optimizer=OptimizerConfig(**optimizer),
    )  # fmt: skip


def make_trainer(config: TrainConfig, L: int, D: int) -> tuple[Trainer, Activations]:
    """A trainer without a language model, and a batch for it."""
    shape = ModelShape(layers=L, d_model=D, heads=1, vocab=1)
    rows = torch.zeros(config.batch_rows, S, dtype=torch.int64)
    trainer = Trainer(config, language_model=SimpleNamespace(shape=shape, tokenizer=None), rows=rows)  # type: ignore[arg-type]
    return trainer, activations(L, D, config.batch_rows)


def planned_and_measured(config: TrainConfig, L: int = 4, D: int = 64) -> tuple[int, int]:
    before = held()
    trainer, batch = make_trainer(config, L, D)
    following = activations(L, D, config.batch_rows)
    for _ in range(2):
        trainer.train_step(batch)
    start = held() - before
    with peak_allocation() as peak:
        trainer.train_step(batch)
    del following
    plan = memory.make_plan(config, ModelShape(L, D))
    return max(plan.phase(phase) for phase in (*FORWARD, *NOTED)), start + peak[0]


CASES = {
    "many weights, both modes": configured(F=8192),
    "many weights, vanilla mode": configured(F=8192, policy="none"),
    "8-bit moments": configured(F=8192, rows=16, state="8bit"),
    "weights in bf16": configured(F=8192, rows=16, dtype="bf16", state="8bit"),
    "many tokens, both modes": configured(F=1024, rows=64),
    "many tokens, vanilla mode": configured(F=1024, rows=64, policy="none"),
    "many tokens, batchtopk": configured(F=1024, rows=64, activation="batchtopk"),
    "many tokens, jumprelu": configured(F=1024, rows=64, activation="jumprelu"),
    "per-layer transcoders": configured(F=8192, rows=16, targets="own"),
    "many weights, bf16 products": configured(F=8192, precision="bf16"),
    "many tokens, bf16 products": configured(F=1024, rows=64, precision="bf16"),
    "micro-batches, bf16 products": configured(F=1024, rows=96, policy="none", micro=16, precision="bf16"),
    "micro-batches, both modes": configured(F=1024, rows=64, micro=16),
    "micro-batches, vanilla mode": configured(F=1024, rows=96, policy="none", micro=16),
}


@pytest.mark.parametrize("name", CASES)
def test_planned_and_measured_peaks_agree_within_five_per_cent(name):
    planned, measured = planned_and_measured(CASES[name])
    assert planned == pytest.approx(measured, rel=0.05), f"{planned / 2**20:.1f} and {measured / 2**20:.1f} MiB"


def test_what_is_held_all_the_time_is_planned_to_the_byte():
    """Term by term, with the settings of Gemma-2-2B's plan, scaled down."""
    config = configured(F=512, K=4, dtype="bf16", state="8bit")
    trainer, batch = make_trainer(config, L=5, D=48)
    for _ in range(2):
        trainer.train_step(batch)

    def bytes_of(*tensors: torch.Tensor) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    connections = [module.connections for module in trainer.clt if module.connections]
    orders = [tensor for c in connections for tensor in c.transposed]
    captured = [t for value in vars(batch).values() for t in (value if isinstance(value, list) else [value])]
    held = {
        "weights": bytes_of(*trainer.clt.parameters()),
        "optimiser state": bytes_of(*trainer.optimizer.tensors().values()),
        "activity of latents": bytes_of(*(t for a in trainer.activity.values() for t in a.state().values())),
        "connections": bytes_of(*(c.indices for c in connections), *orders),
        "activations captured": 2 * bytes_of(*(t for t in captured if torch.is_tensor(t) and t.is_floating_point())),
    }
    planned = {term.name: term.bytes for term in memory.make_plan(config, ModelShape(5, 48)).terms}
    for name, measured in held.items():
        assert planned[name] == pytest.approx(measured, rel=0.01), name


def test_the_planned_shuffle_buffer_is_what_is_held_and_stays_within_its_bytes(monkeypatch):
    config, L, D = configured(F=512, rows=16, shuffle_bytes=40 << 20), 4, 64

    def ahead(items, device=None):
        """What one_ahead holds, without its thread."""
        items = iter(items)
        following = next(items)
        while following is not None:
            item, following = following, next(items, None)
            yield item

    monkeypatch.setattr("sparseclt.training.batches.one_ahead", ahead)
    monkeypatch.setattr("sparseclt.data.activation_stream.one_ahead", ahead)
    shape = ModelShape(layers=L, d_model=D, heads=1, vocab=1)
    capture = lambda tokens, **keywords: activations(L, D, len(tokens))  # noqa: E731
    model = SimpleNamespace(shape=shape, tokenizer=None, capture=capture, device=torch.device("cpu"))
    before = held()
    trainer = Trainer(config, language_model=model, rows=torch.zeros(config.batch_rows, S, dtype=torch.int64))  # type: ignore[arg-type]
    start, batches = held() - before, trainer.batches.from_step(trainer.step)
    batch = next(batches)
    buffer = held() - before - start
    (term,) = (t for t in memory.make_plan(config, ModelShape(L, D)).terms if t.name == "shuffle buffer")
    capturing = captured_bytes(config, ModelShape(L, D), batch.tokens.numel())  # while a block is being filled
    assert buffer + capturing == pytest.approx(term.bytes, rel=0.01)
    assert 30 << 20 < term.bytes <= config.activations.shuffle_bytes


def test_the_plan_grows_linearly_in_tokens_and_in_latents():
    def peak(**sizes) -> int:
        return memory.make_plan(configured(**sizes), ModelShape(12, 768)).peak

    for name, at in (("rows", 64), ("F", 1 << 16)):
        one, two, three = (peak(**{name: at * times}) for times in (1, 2, 3))
        assert three - two == pytest.approx(two - one, rel=1e-3)


def test_what_a_pass_keeps_for_backward_grows_linearly_in_layers():
    """Of two modes, with decoders so small that tokens are all that counts."""

    def kept(L: int) -> int:
        trainer, batch = make_trainer(configured(F=64, K=32, rows=8), L, 8)
        for _ in range(2):
            trainer.train_step(batch)
        storages: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            passes = trainer.objective.passes(batch, DecoderGradients(trainer.clt))
        assert set(passes) == {"vanilla", "sparse"}
        return sum(storage.nbytes() for storage in storages.values())

    few, some, many = (kept(L) for L in (4, 8, 16))
    assert many - some == pytest.approx(2 * (some - few), rel=0.1)


def test_a_full_size_clt_is_planned_and_its_dense_baseline_is_not():
    config = configured(F=24_576, K=32, state="8bit", rows=2)
    shape = ModelShape(12, 768, 12, 124_000_000)
    assert memory.make_plan(config, shape, 14 * memory.GiB).fits
    assert not memory.dense_plan(config, shape, 24 * memory.GiB).fits


def test_the_scratch_of_ops_on_a_gpu_is_a_share_of_what_is_available():
    def scratch(device: str, available: int | None) -> dict[str, int]:
        config = replace(configured(F=65_536, K=32, rows=64), device=device)
        plan = memory.make_plan(config, ModelShape(layers=12, d_model=768), available)
        return {term.name: term.bytes for term in plan.terms}

    free, N, F, C = 64 << 30, 64 * S, 65_536, 16
    most = max(active_by_layer(32, CLTConfig().active_ratio, 12, F))
    assert scratch("cpu", free)["scratch of an op"] == SCRATCH_BYTES["torch"]
    gpu = scratch("cuda", free)
    assert gpu["scratch of an op"] == min(4 * N * F, free // 32) == 1 << 30
    assert scratch("cuda", 8 << 30)["scratch of an op"] == 256 << 20
    assert scratch("cuda", None)["scratch of an op"] == SCRATCH_BYTES["triton"]
    assert gpu["scores of connections"] >= free // 32
    assert gpu["upstream values that connections read"] == 4 * N * most * C
    assert gpu["partial sums and sorted slots"] == min(256 << 20, 4 * 768 * F * C // 128) + 16 * F * C


def test_a_run_that_does_not_fit_is_refused_before_it_allocates(monkeypatch):
    monkeypatch.setattr("sparseclt.training.memory.available_bytes", lambda device: 100 << 20)
    shape = ModelShape(layers=4, d_model=64, heads=1)
    expected = r"memory: .* GiB are available; each change .*least harmful first: .*--optimizer.state 8bit"
    with pytest.raises(ValueError, match=expected):
        Trainer(configured(F=8192), language_model=SimpleNamespace(shape=shape, tokenizer=None), rows=torch.zeros(4, S))  # type: ignore[arg-type]


def test_advice_ends_with_what_fits():
    shape = ModelShape(4, 64)
    for config, share in [(configured(F=8192, shuffle_bytes=n), s) for n in (0, 64 << 20) for s in (0.9, 0.5, 0.2)]:
        available = int(memory.make_plan(config, shape).peak * share)
        peaks = [peak for _, peak in memory.advice(config, shape, available)]
        assert all(peak > available for peak in peaks[:-1]) and peaks[-1] <= available


def test_advice_leaves_out_changes_that_the_configuration_refuses():
    """bf16 with attention latents, for one."""
    config, shape = configured(F=8192), ModelShape(4, 64, 2)
    config = replace(config, clt=replace(config.clt, attention="latents"))
    changes = [change for change, _ in memory.advice(config, shape, 0)]
    assert "--optimizer.state 8bit" in changes and not any("clt.dtype" in change for change in changes)


def test_the_command_prints_every_term_and_says_whether_it_fits(capsys):
    gemma = "plan --shape.layers 26 --shape.d-model 2304 --clt.latents 16384 --clt.active 64".split()
    assert main([*gemma, "--memory-gib", "80"]) == 1
    shown = capsys.readouterr().out
    assert "| weights |" in shown and "Does not fit" in shown and "--clt.dtype bf16" in shown
    assert main([*gemma, "--memory-gib", "80", "--clt.dtype", "bf16", "--optimizer.state", "8bit"]) == 0


def test_the_shape_of_a_model_is_read_without_its_weights(capsys):
    assert main(["plan", "--memory-gib", "4"]) == 0
    assert "language model" in capsys.readouterr().out


def test_the_tables_in_the_docs_are_what_their_commands_print(capsys):
    page = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("    sparseclt plan")]
    assert commands
    for command in commands:
        main(command)
        assert capsys.readouterr().out.strip().splitlines()[-1] in page
    main(commands[0])
    assert capsys.readouterr().out.strip() in page
