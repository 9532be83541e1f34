"""The time of a training step by count: operations and bytes over the rates of a machine. Nothing is measured."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sparseclt.config import TrainConfig
from sparseclt.costs import (
    BYTES,
    FLOAT,
    Cost,
    Rates,
    Widths,
    connected_encode,
    jumprelu_encode,
    select_connections,
    sparse_decode,
    topk_encode,
    total,
    virtual_weights,
)
from sparseclt.model.shape import ModelShape
from sparseclt.training.memory_plan import GiB, make_plan
from sparseclt.training.rank_plan import exchanges_ahead, selection_bytes, step_exchanges
from sparseclt.training.run_sizes import RunSizes

CHOICE = "choice of connections, over the steps between two"
MOST_RANKS = 4096  # in the table of numbers of ranks


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step of one rank: to compute, by name; to send; and what is done for the next step meanwhile."""

    computing: dict[str, float]
    sending: float
    language_model: float
    """The run of the language model, on the same device unless it has one of its own."""
    sending_ahead: float
    own_device: bool

    @property
    def step(self) -> float:
        """One after another, except that the language model runs beside the step on a device of its own, and that
        activations are sent beside it."""
        own = sum(self.computing.values()) + self.sending
        beside = max(self.language_model * self.own_device, self.sending_ahead)
        return max(own + self.language_model * (not self.own_device), beside)

    @property
    def binds(self) -> str:
        """What most of the step goes to."""
        parts = {
            "computing": sum(self.computing.values()),
            "sending": self.sending,
            "the language model": self.language_model,
            "sending activations": self.sending_ahead,
        }
        return max(parts, key=lambda name: parts[name])


def step_costs(x: RunSizes) -> dict[str, Cost]:
    """Operations and bytes of a step of one rank, both modes. A decoder row that two tokens gather counts twice, as if
    there were no cache."""
    n, w, wide = x.ranks, Widths(number=x.p), Widths(number=FLOAT)
    F, D = x.F // n, x.D // n
    encode = jumprelu_encode if x.config.clt.activation == "jumprelu" else topk_encode
    encoders: list[Cost] = []
    decoders: list[Cost] = []
    connected: list[Cost] = []
    weights: list[Cost] = []
    readers = iter(zip(x.readers, x.connections, x.heads_of_readers, strict=True))
    for K, targets, upstream in zip(x.Ks, x.size.targets, x.size.upstream, strict=True):
        own = max(1, K // n)  # of a token's latents those in this rank's rows, on average
        encoders += encode(w, x.N, x.D, F, own).values()
        decoders += [cost * x.modes for cost in sparse_decode(w, x.N, D, x.F, K, targets).values()]
        if x.sparse and upstream:
            modules, C, heads = next(readers)
            U, S = modules * x.F, sum(x.Ks[:modules])
            connected += connected_encode(w, x.N, x.D, F, own, C, U, S).values()
            weights += [cost * heads for cost in virtual_weights(wide, D, x.F, C, U).values()]
        elif x.sparse:
            encoders += encode(w, x.N, x.D, F, own).values()
    if x.sparse:  # running sums of decoders, for virtual weights and for their gradient
        slices = 2 * x.size.decoder_vectors * D
        weights.append(Cost(slices, slices * (x.w + 2 * FLOAT), slices * (x.w + 2 * FLOAT)))
    chosen = Cost()
    if x.choosing:
        pairs = zip(x.readers, x.connections, x.heads_of_readers, strict=True)
        chosen = total(select_connections(wide, x.D, F, C, u * x.F)["forward"] * heads for u, C, heads in pairs)
    return {
        "encoders": total(encoders),
        "connected encoders": total(connected),
        "decoders": total(decoders),
        "virtual weights": total(weights),
        "Adam": _adam(x),
        CHOICE: chosen * x.choosing,
    }


def _adam(x: RunSizes) -> Cost:
    """Weights and moments are read and written, and so is the gradient, which is made for it."""
    moment = 1 if x.config.optimizer.state == "8bit" else FLOAT
    moved = x.size.weights // x.ranks * (2 * x.w + 4 * moment + 2 * FLOAT)
    return Cost(12 * x.size.weights / x.ranks, moved, moved)


def step_time(config: TrainConfig, shape: ModelShape, rates: Rates) -> StepTime:
    """The time of a step of the rank that has most to do: the first of those that share the CLT."""
    x = RunSizes(config, shape)
    computing = {name: rates.seconds(cost) for name, cost in step_costs(x).items() if cost.flops}
    read = shape.parameters * BYTES[config.model.dtype]
    captured = config.activations.cache is None
    model = rates.seconds(Cost(2.0 * shape.parameters * x.N, read, read)) * captured
    exchanges = step_exchanges(x), exchanges_ahead(x)
    sent, ahead = (sum(one.bytes for one in found) / (rates.link * 1e9) for found in exchanges)
    sent += selection_bytes(x) * x.choosing / (rates.link * 1e9)
    return StepTime(computing, sent, model, ahead, bool(config.parallel.model_devices))


def table(config: TrainConfig, shape: ModelShape, rates: Rates, available: int | None) -> str:
    """The time of a step by its parts, and that on other numbers of ranks that share the CLT."""
    time = step_time(config, shape, rates)
    rows = [*time.computing.items(), ("language model", time.language_model), ("sent in the step", time.sending)]
    rows.append(("sent ahead, beside the step", time.sending_ahead))
    lines = ["", "| a step of the busiest rank, by count | ms at least |", "| --- | ---: |"]
    lines += [f"| {name} | {seconds * 1e3:.3f} |" for name, seconds in rows if seconds]
    lines.append(f"| **step** | **{time.step * 1e3:.3f}** |")
    lines.append(f"\nMost of it: {time.binds}. {_rates(rates)}")
    columns = (
        "parallel.latents",
        "GiB per rank",
        "fits",
        "computing, ms",
        "sending, ms",
        "step, ms",
        "tokens/s per rank",
    )
    lines += ["", f"| {' | '.join(columns)} |"]
    lines.append("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for n in _numbers_of_ranks(config, shape):
        other = replace(config, parallel=replace(config.parallel, latents=n))
        peak, t = make_plan(other, shape).peak, step_time(other, shape, rates)
        fits = "" if available is None else "yes" if peak <= available else "no"
        speed = RunSizes(other, shape).N / n / t.step
        lines.append(
            f"| {n} | {peak / GiB:.1f} | {fits} | {sum(t.computing.values()) * 1e3:.1f} | {t.sending * 1e3:.1f} | "
            f"{t.step * 1e3:.1f} | {speed:.0f} |"
        )
    return "\n".join(lines)


def _rates(rates: Rates) -> str:
    return (
        f"At {rates.tflops:g} TFLOP/s, {rates.memory:g} GB/s of memory and {rates.link:g} GB/s between devices, which "
        f"no program reaches; top-k, small kernels and waiting for others are left out."
    )


def _numbers_of_ranks(config: TrainConfig, shape: ModelShape) -> Iterable[int]:
    n = 1
    while n <= MOST_RANKS and config.clt.latents % n == 0 and shape.d_model % n == 0:
        yield n
        n *= 2
