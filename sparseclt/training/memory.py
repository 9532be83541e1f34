"""Runs that do not fit into memory: the check before a run, the message after a failure, and advice for both.

The plan itself, with its formulas, is in `memory_plan`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch

from sparseclt.config import TrainConfig
from sparseclt.data.activation_stream import least_bytes, number_bytes
from sparseclt.model.shape import ModelShape
from sparseclt.training.available import host_bytes
from sparseclt.training.evaluation_memory import evaluation_rows
from sparseclt.training.memory_plan import GiB, Plan, dense_plan, make_plan, table

__all__ = [
    "GiB", "OutOfMemory", "Plan", "advice", "advice_text", "available_bytes", "check_fits", "dense_plan",
    "evaluation_rows", "explain", "is_out_of_memory", "make_plan", "shape_of", "table",
]  # fmt: skip


class OutOfMemory(RuntimeError):
    """A training step ran out of memory; the message holds the plan and advice to make it smaller."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: torch's on a GPU, its CPU allocator's, or Python's own."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where it is unknown. On the CPU, as much as this process may still take."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0]
    return host_bytes() if device.type == "cpu" else None


def advice(config: TrainConfig, shape: ModelShape, available: int) -> list[tuple[str, int]]:
    """Changes that make a run fit, least harmful first: options, each on top of the ones before, and the peak (bytes)
    that they leave, up to the first that fits."""
    found: list[tuple[str, int]] = []
    peak = make_plan(config, shape).peak
    for option, change in _changes(shape):
        try:
            changed = change(config)
        except ValueError:  # the configuration does not allow it
            continue
        lower = make_plan(changed, shape).peak
        if lower >= peak:
            continue
        config, peak = changed, lower
        value: object = config
        for name in option.split("."):
            value = getattr(value, name)
        found.append((f"--{option.replace('_', '-')} {value}", peak))
        if peak <= available:
            break
    return found


def _changes(shape: ModelShape) -> list[tuple[str, Callable[[TrainConfig], TrainConfig]]]:
    """Options and what to change about them, least harmful first."""
    return [
        *[("compute.micro_batch_rows", _half_the_micro_batch)] * 2,
        *[("activations.shuffle_bytes", lambda c: _smaller_buffer(c, shape))] * 3,
        ("model.dtype", lambda c: replace(c, model=replace(c.model, dtype="bf16"))),
        ("optimizer.state", lambda c: replace(c, optimizer=replace(c.optimizer, state="8bit"))),
        ("compute.precision", lambda c: replace(c, compute=replace(c.compute, precision="fp32"))),
        ("clt.dtype", _weights_in_bf16),
        *[("batch_rows", lambda c: replace(c, batch_rows=max(1, c.batch_rows // 2)))] * 3,
        *[("clt.latents", lambda c: replace(c, clt=replace(c.clt, latents=max(c.clt.active, c.clt.latents // 2))))] * 6,
    ]


def _weights_in_bf16(config: TrainConfig) -> TrainConfig:
    return replace(config, clt=replace(config.clt, dtype="bf16"), compute=replace(config.compute, precision=None))


def _half_the_micro_batch(config: TrainConfig) -> TrainConfig:
    rows = max(1, (config.compute.micro_batch_rows or config.batch_rows) // 2)
    return replace(config, compute=replace(config.compute, micro_batch_rows=rows))


def _smaller_buffer(config: TrainConfig, shape: ModelShape) -> TrainConfig:
    a, tokens = config.activations, config.batch_rows * config.data.row_tokens
    least = min(a.shuffle_bytes, least_bytes(tokens, shape.layers, shape.d_model, number_bytes(config)))
    return replace(config, activations=replace(a, shuffle_bytes=max(a.shuffle_bytes // 2, least)))


def check_fits(config: TrainConfig, shape: ModelShape, available: int | None) -> Plan:
    """The plan of a run. Raises ValueError, with its peak and advice, if it does not fit."""
    plan = make_plan(config, shape, available)
    if available is not None and not plan.fits:
        raise ValueError(
            f"memory: this run would hold {plan.peak / GiB:.2f} GiB, and {available / GiB:.2f} GiB are available; "
            f"{advice_text(config, shape, available)} (sparseclt plan shows every term)"
        )
    return plan


def explain(config: TrainConfig, shape: ModelShape) -> str:
    """The message for a step that ran out of memory: its plan, and changes that take a quarter off its peak."""
    plan = make_plan(config, shape)
    changes = advice_text(config, shape, plan.peak * 3 // 4)
    rows = config.compute.micro_batch_rows or config.batch_rows
    return f"out of memory, in micro-batches of {rows} rows; {changes}. The plan of this run:\n{table(plan)}"


def advice_text(config: TrainConfig, shape: ModelShape, available: int) -> str:
    """`advice` as one line."""
    steps = [f"{change} ({peak / GiB:.2f} GiB)" for change, peak in advice(config, shape, available)]
    if not steps:
        return "no change of these options makes it smaller"
    return f"each change on top of the ones before, least harmful first: {', '.join(steps)}"


def shape_of(path: str, layers: int | None = None) -> ModelShape:
    """The shape of a model, read from its configuration without its weights: 'embedded', a directory or a hub name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparseclt.language_model.files import locate

    found = locate(path)
    config = AutoConfig.from_pretrained(str(found or path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return ModelShape(
        layers=layers or config.num_hidden_layers,
        d_model=config.hidden_size,
        heads=config.num_attention_heads,
        parameters=sum(p.numel() for p in model.parameters()),
        parallel=bool(getattr(config, "use_parallel_residual", False)),
        vocab=config.vocab_size,
    )
