"""The memory of a training run, term by term, computed before anything is allocated."""

from dataclasses import dataclass

from sparseclt.config import TrainConfig
from sparseclt.connections.attended import KEYS
from sparseclt.costs import FLOAT, ID, POSITION, adam_state_bytes, dense_training_bytes
from sparseclt.data.activation_stream import buffer_bytes
from sparseclt.devices import resolve
from sparseclt.model.decoder_gradients import CHUNK_BYTES
from sparseclt.model.shape import ModelShape
from sparseclt.ops.backend import INSTALLED
from sparseclt.ops.scratch import UPDATE_BYTES
from sparseclt.training.evaluation_memory import evaluation_terms
from sparseclt.training.optimizer import PIECE_BYTES
from sparseclt.training.rank_plan import Sent, exchanges_ahead, of_rank, selection_bytes, step_exchanges
from sparseclt.training.run_sizes import ALWAYS, FORWARD, NOTED, STEP, MemoryTerm, RunSizes, captured_bytes
from sparseclt.training.scratch_memory import scratch_terms
from sparseclt.training.selection_memory import selection_terms
from sparseclt.training.update import KEPT_BYTES

GiB, MiB = 1 << 30, 1 << 20
BANDWIDTHS = (12, 50, 400)  # GB/s of a rank: 100-gigabit network, PCIe 5, NVLink


@dataclass(frozen=True)
class Plan:
    """The terms of a run, and the bytes that are available; None: unknown."""

    terms: tuple[MemoryTerm, ...]
    available: int | None
    sent: tuple[Sent, ...] = ()
    """What one of several ranks sends in a step."""
    sent_ahead: tuple[Sent, ...] = ()
    """What it sends meanwhile for the next step."""
    sent_to_choose: int = 0
    """Bytes that it sends besides in a step that chooses connections."""

    def phase(self, name: str) -> int:
        """Bytes held in one phase of the run."""
        return sum(term.bytes for term in self.terms if name in term.phases)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(self.phase(name) for name in ALWAYS)

    @property
    def fits(self) -> bool:
        return self.available is None or self.peak <= self.available


def make_plan(config: TrainConfig, shape: ModelShape, available: int | None = None) -> Plan:
    """The memory of a training run of `config` on a model of `shape`; `available`: bytes of the device. On several
    ranks (`config.parallel`), that of one of them.

    Every term is linear in N and in F, and in the number of decoder vectors; none grows as N x F, F x F or F x U.
    """
    run = RunSizes(config, shape, available)
    terms = [*_state_terms(run), *_pass_terms(run), *_rounded_terms(run), *scratch_terms(run), *_update_terms(run)]
    terms += [*_connection_terms(run), *selection_terms(run)]
    terms = of_rank(terms, run)
    held = sum(term.bytes for term in terms if "evaluation" in term.phases)
    terms += evaluation_terms(run, None if available is None else available - held)
    held_terms, sent = tuple(term for term in terms if term.bytes), tuple(step_exchanges(run))
    return Plan(held_terms, available, sent, tuple(exchanges_ahead(run)), selection_bytes(run))


def dense_plan(config: TrainConfig, shape: ModelShape, available: int | None = None) -> Plan:
    """The memory of a plain dense trainer of the same CLT: fp32 Adam with all gradients, pre-activations [N, F] of
    every module and mode, and, for every reader, a virtual weight matrix F x U, its mask and its gradient."""
    run = RunSizes(config, shape)
    held = dense_training_bytes(run.size, run.N, 1 if config.connections.policy == "none" else 2)
    terms = [
        MemoryTerm("weights, gradients and Adam's state", held["states"], ALWAYS, "16 (P_enc + P_dec)"),
        MemoryTerm("language model", run.model_number * shape.parameters, ALWAYS, "4 P_model; bf16, fp16: 2 P_model"),
        MemoryTerm("pre-activations and latents", held["latents"], ALWAYS, "8 N F (modes x M + 1)"),
        MemoryTerm("virtual weights, masks and gradients", held["virtual weights"], ALWAYS, "12 F U per reader"),
    ]
    return Plan(tuple(term for term in terms if term.bytes), available)


def table(plan: Plan) -> str:
    """A plan as a Markdown table, in GiB, and whether it fits."""
    lines = ["| term | GiB | held in | formula (bytes) |", "| --- | ---: | --- | --- |"]
    for term in sorted(plan.terms, key=lambda term: -term.bytes):
        held = {ALWAYS: "the whole run", STEP: "the whole step"}.get(term.phases, ", ".join(term.phases))
        lines.append(f"| {term.name} | {term.bytes / GiB:.3f} | {held} | {term.formula} |")
    largest = max(ALWAYS, key=plan.phase)
    lines.append(f"| **peak** ({largest}) | **{plan.peak / GiB:.3f}** | | |")
    if plan.available is not None:
        lines.append(f"\n{'Fits' if plan.fits else 'Does not fit'}: {plan.available / GiB:.2f} GiB available.")
    return "\n".join([*lines, *_sent(plan)])


def _sent(plan: Plan) -> list[str]:
    """What a rank sends, as a table, and how long that takes."""
    if not plan.sent and not plan.sent_ahead:
        return []
    lines = ["", "| sent by a rank in a step | MiB | collective | formula (bytes) |", "| --- | ---: | --- | --- |"]
    for sent in sorted(plan.sent, key=lambda sent: -sent.bytes):
        lines.append(f"| {sent.name} | {sent.bytes / MiB:.3f} | {sent.collective} | {sent.formula} |")
    total = sum(sent.bytes for sent in plan.sent)
    lines.append(f"| **all** | **{total / MiB:.3f}** | | |")
    for sent in plan.sent_ahead:
        lines.append(
            f"| {sent.name}, for the next step | {sent.bytes / MiB:.3f} | {sent.collective} | {sent.formula} |"
        )
    times = ", ".join(f"{total / (speed * 1e9) * 1e3:.3g} ms at {speed} GB/s" for speed in BANDWIDTHS)
    lines.append(f"\nA step waits {times} per rank, as far as nothing is computed meanwhile.")
    if plan.sent_to_choose:
        lines.append(f"A step that chooses connections sends {plan.sent_to_choose / MiB:.3f} MiB more.")
    return lines


def _state_terms(x: RunSizes) -> list[MemoryTerm]:
    """Everything that outlives a step."""
    config = x.config
    state = adam_state_bytes(x.size, config.optimizer.state == "8bit", config.optimizer.rows == "touched")
    return [
        MemoryTerm("weights", x.w * x.size.parameters, ALWAYS, "w (P_enc + P_dec)"),
        MemoryTerm("optimiser state", state, ALWAYS,
                   "8 (P_enc + P_dec), 8bit: 2 (P_enc + P_dec) + 8 (P_enc + P_dec) / D"),
        MemoryTerm("language model", x.own_model, ALWAYS, "4 P_model; bf16, fp16: 2 P_model"),
        _activations(x),
        MemoryTerm(
            "activity of latents", _activity_bytes(x), ALWAYS,
            "2 x 16 M F + 8 (M K + 4 per attention module) x recent tokens",
        ),
    ]  # fmt: skip


def _activations(x: RunSizes) -> MemoryTerm:
    config = x.config
    if config.activations.shuffle_bytes:
        size = buffer_bytes(config.activations.shuffle_bytes, x.N, config.steps, x.L, x.D, x.v)
        formula = "at most shuffle_bytes: 2 blocks of activations, and 3 batches"
        return MemoryTerm("shuffle buffer", size, STEP, formula)
    captured = 2 * captured_bytes(config, x.shape, x.N)
    return MemoryTerm("activations captured", captured, STEP, "2 x v N D (1 + 3 L): this batch and the next")


def _activity_bytes(x: RunSizes) -> int:
    connections = x.config.connections
    coactivation = connections.policy != "none" and connections.importance == "coactivation"
    recent = connections.recent_tokens if coactivation else 0
    keys = KEYS * 2 * FLOAT * (x.M - x.L)  # of attention modules
    return 2 * x.M * x.F * (ID + 2 * FLOAT) + recent * (x.M * x.K * 2 * FLOAT + keys)


def _recent_gradient_bytes(x: RunSizes) -> int:
    places = x.shape.heads if x.config.clt.attention == "latents" else 1
    return x.M * x.config.connections.recent_tokens * (3 * FLOAT * x.K + 2 * FLOAT * places)


def _pass_terms(x: RunSizes) -> list[MemoryTerm]:
    """The forward and backward passes, and what they leave behind for the update."""
    encoders = x.w * (x.size.encoder_vectors * x.D + x.size.biases)
    kept = x.micro_outputs + 33 * x.n * x.active
    candidates = (x.config.clt.activation != "topk") * x.modes * 14 * x.n * x.active
    emptied = (x.config.clt.activation != "batchtopk") * x.modes * FLOAT * x.n * x.active
    one_module = (FLOAT + (x.p < FLOAT) * x.p) * x.n * x.D * x.widest
    rounded, kept_modes = (x.modes, 1) if x.p < FLOAT else (0, x.modes)
    return [
        MemoryTerm("encoder gradients", encoders, ("backward", *NOTED), "w P_enc"),
        MemoryTerm("activations in float32", (x.v < FLOAT) * 2 * x.micro_outputs, FORWARD,
                   "8 n D L, where v = 2: inputs and outputs"),
        MemoryTerm("reconstructions", x.modes * x.micro_outputs, FORWARD,
                   "modes x 4 n D L; n: tokens of a micro-batch"),
        MemoryTerm("active latents", x.active_latents, (*FORWARD, *NOTED), "modes x 12 N K M"),
        MemoryTerm("candidates for active latents", candidates, FORWARD, "modes x 14 n K M"),
        MemoryTerm("latents before those of position 0 are emptied", emptied, FORWARD,
                   "modes x 4 n K M; BatchTopK: among the candidates"),
        MemoryTerm("latents of all micro-batches", x.in_parts * x.active_latents, NOTED, "modes x 12 N K M"),
        MemoryTerm("kept for backward", x.sparse * kept, FORWARD, "4 n D L + 33 n K M"),
        MemoryTerm("gradients of reconstructions, earlier micro-batches",
                   x.modes * (x.outputs - x.micro_outputs) * x.p // FLOAT, FORWARD, "modes x p (N - n) D L"),
        MemoryTerm("gradients of reconstructions, in backward", kept_modes * x.micro_outputs, ("backward",),
                   "modes x 4 n D L; p = 2: of one mode at a time"),
        MemoryTerm("the same, rounded", rounded * x.micro_outputs * x.p // FLOAT, ("backward",), "modes x 2 n D L"),
        MemoryTerm("gradients of reconstructions, for the update", x.modes * x.outputs * x.p // FLOAT, NOTED,
                   "modes x p N D L"),
        MemoryTerm("reconstructions by one module", one_module, FORWARD, "4 n D L; p = 2: 6 n D L"),
        MemoryTerm("one encoder's gradient", 2 * x.w * x.F * x.D, ("backward",), "2 w F D"),
    ]  # fmt: skip


def _rounded_terms(x: RunSizes) -> list[MemoryTerm]:
    """Copies in bf16 of what products read."""
    if not x.rounds:
        return []
    readings = x.modes * x.n * x.D * x.M * x.p - x.sparse * x.micro_outputs
    return [
        MemoryTerm("encoders in bf16", x.modes * x.p * x.size.encoder_vectors * x.D, FORWARD, "modes x 2 P_enc"),
        MemoryTerm("decoders in bf16", x.p * x.size.decoder_vectors * x.D, FORWARD, "2 P_dec"),
        MemoryTerm("virtual weights in bf16", x.sparse * x.p * x.slots, FORWARD, "2 F C per reader"),
        MemoryTerm("readings in bf16", readings, FORWARD, "modes x 2 n D L, less 4 n D L kept for backward in fp32"),
        MemoryTerm("active latents in bf16", x.modes * x.p * x.N * x.active, (*FORWARD, *NOTED), "modes x 2 N K M"),
        MemoryTerm("values of encoders in bf16", x.modes * x.p * x.n * x.active, FORWARD, "modes x 2 n K M"),
    ]  # fmt: skip


def _update_terms(x: RunSizes) -> list[MemoryTerm]:
    """Decoder gradients, computed from what the passes left behind, a chunk at a time where they are large."""
    device = resolve(x.config.device)
    D = x.D // x.ranks
    decoders, largest = FLOAT * x.size.decoder_vectors * D, FLOAT * x.F * D * x.widest
    one_pass, small = _in_one_pass(x), decoders <= KEPT_BYTES
    if small:
        kept, summed = decoders, (x.modes - 1) * FLOAT * x.F * D
    elif one_pass:
        kept, summed = min(UPDATE_BYTES, largest), (x.modes - 1) * 2 * FLOAT * x.F * D
    else:
        kept = summed = min(CHUNK_BYTES.on(device), largest)
    widened = x.config.clt.dtype == "bf16" or x.config.optimizer.state == "8bit"
    pieces = (5 if widened else 1) * min(PIECE_BYTES.on(device), largest)
    side_by_side = x.modes * FLOAT * x.N * x.D * (1 if one_pass and small else x.widest)
    slots = one_pass * x.modes * (FLOAT + 4 * POSITION) * x.N * x.K
    return [
        MemoryTerm("gradients of reconstructions, side by side", side_by_side + slots, ("update",),
                   "modes x 4 N D L; by numba modes x (4 N D L + 20 N K), or 4 N D in place of 4 N D L "
                   "if P_dec fits in 256 MiB"),
        MemoryTerm("decoder gradients", kept + max(summed, pieces), ("update",),
                   "4 P_dec, or 64 MiB (CPU: 8, numba 16), plus partial sums or 1 piece of weights, 5 if widened"),
    ]  # fmt: skip


def _in_one_pass(x: RunSizes) -> bool:
    """Whether decoders are updated by `ops.optimizer_step.gathered_decoder`."""
    c, o = x.config, x.config.optimizer
    numba = not x.on_gpu and c.compute.backend in (None, "numba") and "numba" in INSTALLED
    plain = c.clt.dtype == "fp32" and x.p == FLOAT and o.state == "fp32" and o.rows != "touched"
    return numba and plain and x.ranks * x.data == 1 and c.clt.attention == "frozen"


def _connection_terms(x: RunSizes) -> list[MemoryTerm]:
    if not x.sparse:
        return []
    pointers = POSITION * x.F * x.size.pairs
    return [
        MemoryTerm("connections", x.slots * (ID + POSITION) + pointers, ALWAYS, "12 F C + 4 U per reader"),
        MemoryTerm("virtual weights and their gradient", 2 * x.w * x.slots, ALWAYS, "2 w F C per reader"),
        MemoryTerm("effective decoders", FLOAT * x.F * x.D * max(x.readers), ("selection", "forward", "encoders"),
                   "4 F D (L - 1)"),
        MemoryTerm("gradients of recent latents", x.exchanging * _recent_gradient_bytes(x), ALWAYS,
                   "12 M K x recent tokens + 8 M x recent tokens (attention: 8 M H), if learned and exchanged"),
        MemoryTerm("gradients of latents", x.exchanging * FLOAT * x.N * x.active, ("backward", *NOTED),
                   "4 N K M, if learned and exchanged"),
        MemoryTerm("logits of connections", x.learned * 4 * FLOAT * x.slots, ALWAYS, "16 F C per reader, if learned"),
    ]  # fmt: skip
