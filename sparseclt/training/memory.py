"""What a training run will hold in memory, term by term, before anything is allocated."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparseclt.config import ModelShape, TrainConfig
from sparseclt.data.activation_stream import buffer_bytes, least_bytes
from sparseclt.devices import resolve
from sparseclt.model.decoder_gradients import CHUNK_BYTES
from sparseclt.model.sites import model_sites, upstream_modules
from sparseclt.ops.scratch import default_scratch
from sparseclt.training.optimizer import KEPT_BYTES, PIECE_BYTES

GiB = 1 << 30
FLOAT, INDEX, SHORT = 4, 8, 4  # bytes of activations, of ids, and of ids in the order of upstream latents


class OutOfMemory(RuntimeError):
    """A training step ran out of memory; the message has the plan and what would make it smaller."""


@dataclass(frozen=True)
class Term:
    """One kind of memory: its bytes, and the phases of a step in which it is held."""

    name: str
    bytes: int
    phases: tuple[str, ...]
    formula: str


# "encoders": their gradient through virtual weights, after the backward passes; "update": the optimiser's step.
ALWAYS = ("forward", "backward", "encoders", "update")
FORWARD = ALWAYS[:2]


@dataclass(frozen=True)
class Plan:
    """The terms of a run, and the memory that there is."""

    terms: tuple[Term, ...]
    available: int | None

    def phase(self, name: str) -> int:
        return sum(term.bytes for term in self.terms if name in term.phases)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(self.phase(name) for name in ALWAYS)

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available


def make_plan(config: TrainConfig, shape: ModelShape, available: int | None = None) -> Plan:
    """The memory of a training run of `config` on a model of `shape`; `available`: bytes of the device.

    Every term is linear in N and in F, and in the number of decoder vectors; none grows as N x F, F x F or F x U.
    """
    return Plan(tuple(term for term in _terms(config, shape) if term.bytes), available)


def _terms(config: TrainConfig, shape: ModelShape) -> list[Term]:
    L, D, F, K = shape.layers, shape.d_model, config.clt.latents, config.clt.active
    S, N = config.data.row_length, config.batch_rows * config.data.row_length
    attention = config.clt.attention == "latents"
    sites = model_sites(L, attention)
    M = len(sites)
    targets = [L - site.layer if site.kind == "mlp" else 1 for site in sites]
    upstream = [upstream_modules(sites, i, shape.parallel) for i in range(M)]
    readers = [u for u in upstream if u]
    w = 2 if config.clt.dtype == "bf16" else 4
    vectors = F * (M + sum(targets))  # encoder and decoder vectors [D]
    biases = M * (F + D)
    encoders = w * (M * F * D + biases)
    sparse = config.connections.policy != "none" and bool(readers)
    modes = 2 if sparse else 1
    aux = config.loss.aux_active if config.loss.aux else 0
    rows = min(config.micro_batch_rows or config.batch_rows, config.batch_rows)
    n, in_parts = rows * S, rows < config.batch_rows
    outputs, part = FLOAT * N * D * M, FLOAT * n * D * M
    passes = modes * (2 if aux else 1)
    decoders, device = 4 * F * D * sum(targets), resolve(config.device)
    chunk = min(CHUNK_BYTES.on(device), FLOAT * F * D * max(targets))
    kept, summed = (decoders, (modes - 1) * FLOAT * F * D) if decoders <= KEPT_BYTES else (chunk, chunk)
    widened = config.clt.dtype == "bf16" or config.optimizer.state == "8bit"
    piece = min(PIECE_BYTES.on(device), FLOAT * F * D * max(targets))
    terms = [
        Term("weights", w * (vectors * D + biases), ALWAYS, "w (P_enc + P_dec)"),
        Term("optimiser state", _state_bytes(config, vectors, D, biases, F * sum(targets)), ALWAYS,
             "8 (P_enc + P_dec), 8bit: 2 (P_enc + P_dec) + 8 (P_enc + P_dec) / D"),
        Term("language model", FLOAT * shape.parameters, ALWAYS, "4 P_model"),
        _activations(config, L, D, N, _captured(L, D, N, S, shape.heads, attention)),
        Term("activity of latents", _activity(config, M, F, K), ALWAYS, "2 x 16 M F + 8 M K x recent tokens"),
        Term("encoder gradients", encoders, ALWAYS[1:], "w P_enc"),
        Term("reconstructions", modes * part, FORWARD, "modes x 4 n D L; n: tokens of a micro-batch"),
        Term("active latents", modes * 12 * N * K * M, ALWAYS, "modes x 12 N K M"),
        Term("latents of all micro-batches", in_parts * modes * 12 * N * K * M, ALWAYS[2:], "modes x 12 N K M"),
        Term("kept for backward", sparse * (part + 33 * n * K * M), FORWARD, "4 n D L + 33 n K M"),
        Term("AuxK, when latents are dead",
             modes * (3 * part + 20 * n * aux * M) if aux else 0, FORWARD, "modes x (12 n D L + 20 n M aux_active)"),
        Term("its latents, noted", modes * 12 * N * aux * M, ALWAYS[2 - in_parts :], "modes x 12 N M aux_active"),
        Term("noted of earlier micro-batches", passes * (outputs - part), FORWARD,
             "modes x 4 (N - n) D L; AuxK: twice"),
        Term("gradients of reconstructions, in backward", modes * part, ("backward",), "modes x 4 n D L"),
        Term("gradients of reconstructions, noted", passes * outputs, ALWAYS[2:], "modes x 4 N D L; AuxK: twice"),
        Term("what one module writes", FLOAT * n * D * max(targets), FORWARD, "4 n D L"),
        Term("their gradients, side by side", passes * FLOAT * N * D * max(targets), ("update",),
             "modes x 4 N D L; AuxK: twice"),
        Term("working memory of an op", min(default_scratch("topk_encode", "torch"), FLOAT * n * F), ("forward",),
             "at most 4 MiB on a CPU"),
        Term("one encoder's gradient", 2 * w * F * D, ("backward",), "2 w F D"),
        Term("decoder gradients", kept + max(summed, 5 * widened * piece), ("update",),
             "4 P_dec, or 64 MiB (CPU: 8); and what is summed up, or 5 pieces widened"),
    ]  # fmt: skip
    if sparse:
        C = [min(config.connections.per_latent, u * F) for u in upstream if u]
        slots = F * sum(C)
        terms += [
            Term("connections", slots * (INDEX + SHORT) + SHORT * F * sum(readers), ALWAYS, "12 F C + 4 U, a reader"),
            Term("virtual weights and their gradient", 2 * w * slots, ALWAYS, "2 w F C, a reader"),
            Term("effective decoders", w * F * D * max(readers), ("forward", "encoders"), "w F D (L - 1)"),
        ]
    return terms


def _state_bytes(config: TrainConfig, vectors: int, D: int, biases: int, decoder_rows: int) -> int:
    small = config.optimizer.state == "8bit"
    state = (2 * vectors * D + 8 * vectors) if small else 8 * vectors * D
    return state + 8 * biases + (4 * decoder_rows if config.optimizer.rows == "touched" else 0)


def _activations(config: TrainConfig, L: int, D: int, N: int, batch: int) -> Term:
    if config.activations.shuffle_bytes:
        size = buffer_bytes(config.activations.shuffle_bytes, N, config.steps, L, D)
        return Term("shuffle buffer", size, ALWAYS, "at most shuffle_bytes: 2 blocks of activations, and 3 batches")
    return Term("activations captured", 2 * batch, ALWAYS, "2 x 4 N D (1 + 3 L): this batch and the next")


def _captured(L: int, D: int, N: int, S: int, H: int, attention: bool) -> int:
    pattern = FLOAT * L * N * (S * H + 1) if attention else 0
    return FLOAT * N * (D * (1 + 3 * L) + L) + pattern


def _activity(config: TrainConfig, M: int, F: int, K: int) -> int:
    recent = config.connections.recent_tokens if config.connections.importance == "coactivation" else 0
    recent = recent if config.connections.policy != "none" else 0
    return 2 * M * F * (INDEX + 2 * FLOAT) + M * recent * K * 2 * FLOAT


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch's on a GPU, its CPU allocator's, or Python's own."""
    cpu = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def available_bytes(device: torch.device) -> int | None:
    """Free memory of a device; None where it cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.exists():
        return None
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def advice(config: TrainConfig, shape: ModelShape, available: int) -> list[tuple[str, int]]:
    """Changes that make a run fit, each on top of those before it, the most harmless first, with the peak that they
    leave; up to the first that fits."""
    steps = [
        *[("micro_batch_rows", _half_the_micro_batch)] * 2,
        *[("activations.shuffle_bytes", lambda c: _smaller_buffer(c, shape))] * 3,
        ("optimizer.state", lambda c: replace(c, optimizer=replace(c.optimizer, state="8bit"))),
        ("clt.dtype", lambda c: replace(c, clt=replace(c.clt, dtype="bf16"))),
        *[("batch_rows", lambda c: replace(c, batch_rows=max(1, c.batch_rows // 2)))] * 3,
        *[("clt.latents", lambda c: replace(c, clt=replace(c.clt, latents=max(c.clt.active, c.clt.latents // 2))))] * 6,
    ]
    found: list[tuple[str, int]] = []
    for name, change in steps:
        changed = change(config)
        peak = make_plan(changed, shape).peak
        if peak >= make_plan(config, shape).peak:
            continue
        config = changed
        section, _, field = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, field)
        found.append((f"--{name.replace('_', '-')} {value}", peak))
        if peak <= available:
            break
    return found


def _half_the_micro_batch(config: TrainConfig) -> TrainConfig:
    return replace(config, micro_batch_rows=max(1, (config.micro_batch_rows or config.batch_rows) // 2))


def _smaller_buffer(config: TrainConfig, shape: ModelShape) -> TrainConfig:
    a, tokens = config.activations, config.batch_rows * config.data.row_length
    least = min(a.shuffle_bytes, least_bytes(tokens, shape.layers, shape.d_model))
    return replace(config, activations=replace(a, shuffle_bytes=max(a.shuffle_bytes // 2, least)))


def check_fits(config: TrainConfig, shape: ModelShape, available: int | None) -> Plan:
    """The plan; a ValueError with its peak and advice where it does not fit."""
    plan = make_plan(config, shape, available)
    if available is not None and not plan.fits:
        raise ValueError(
            f"memory: this run would hold {plan.peak / GiB:.2f} GiB, and {available / GiB:.2f} GiB are available; "
            f"{advice_text(config, shape, available)} (sparseclt plan shows every term)"
        )
    return plan


def explain(config: TrainConfig, shape: ModelShape) -> str:
    """What to do about a step that ran out of memory: the plan, and changes down to three quarters of its peak."""
    plan = make_plan(config, shape)
    changes = advice_text(config, shape, plan.peak * 3 // 4)
    rows = config.micro_batch_rows or config.batch_rows
    return f"out of memory, in micro-batches of {rows} rows. {changes}. The plan of this run:\n{table(plan)}"


def advice_text(config: TrainConfig, shape: ModelShape, available: int) -> str:
    steps = [f"{change} ({peak / GiB:.2f} GiB)" for change, peak in advice(config, shape, available)]
    return f"in order of harm, one on top of the other: {', '.join(steps)}"


def shape_of(path: str, layers: int | None = None) -> ModelShape:
    """The shape of a model from its configuration alone: a local directory, 'embedded', or a hub name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from sparseclt.language_model.files import locate

    found = locate(path)
    config = AutoConfig.from_pretrained(str(found or path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return ModelShape(
        layers or config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
        sum(p.numel() for p in model.parameters()), bool(getattr(config, "use_parallel_residual", False)),
    )  # fmt: skip


def dense_plan(config: TrainConfig, shape: ModelShape, available: int | None = None) -> Plan:
    """What a plain dense trainer would hold for the same CLT: fp32 Adam with all gradients, pre-activations [N, F] of
    every module and mode, and a virtual weight matrix F x U, with its mask and its gradient, for every reader."""
    L, D, F = shape.layers, shape.d_model, config.clt.latents
    N = config.batch_rows * config.data.row_length
    sites = model_sites(L, config.clt.attention == "latents")
    weights = F * D * sum(1 + (L - site.layer if site.kind == "mlp" else 1) for site in sites)
    pairs = sum(upstream_modules(sites, i, shape.parallel) for i in range(len(sites)))
    sparse = config.connections.policy != "none"
    terms = [
        Term("weights, gradients and Adam's state", 16 * weights, ALWAYS, "16 (P_enc + P_dec)"),
        Term("language model", FLOAT * shape.parameters, ALWAYS, "4 P_model"),
        Term("pre-activations and latents", (1 + sparse) * 2 * FLOAT * N * F * len(sites), ALWAYS, "modes x 8 N F M"),
        Term("virtual weights, masks and gradients", 3 * FLOAT * F * F * pairs * sparse, ALWAYS, "12 F U, a reader"),
    ]
    return Plan(tuple(term for term in terms if term.bytes), available)


def table(plan: Plan) -> str:
    """The plan as a Markdown table, in GiB, and whether it fits."""
    lines = ["| term | GiB | held in | formula (bytes) |", "| --- | ---: | --- | --- |"]
    for term in sorted(plan.terms, key=lambda term: -term.bytes):
        held = "all of the step" if term.phases == ALWAYS else ", ".join(term.phases)
        lines.append(f"| {term.name} | {term.bytes / GiB:.3f} | {held} | {term.formula} |")
    largest = max(ALWAYS, key=plan.phase)
    lines.append(f"| **peak** ({largest}) | **{plan.peak / GiB:.3f}** | | |")
    if plan.available is not None:
        lines.append(f"\n{'Fits' if plan.fits else 'Does not fit'}: {plan.available / GiB:.2f} GiB available.")
    return "\n".join(lines)
