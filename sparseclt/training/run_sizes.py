"""The sizes of a training run, which the terms of its memory plan are made of."""

from dataclasses import dataclass

from sparseclt.config import TrainConfig
from sparseclt.connections.selection import MOST
from sparseclt.costs import BYTES, FLOAT, ID, CLTSize
from sparseclt.data.activation_stream import number_bytes
from sparseclt.devices import resolve
from sparseclt.model.shape import ModelShape, active_by_layer, active_slots
from sparseclt.model.sites import model_sites, upstream_modules
from sparseclt.training.precision import products

# The phases of a run. "selection": connections are chosen, at the start of a step; "encoders": their gradient through
# virtual weights, after the backward passes; "update": the optimiser's step; "evaluation": after the last step.
STEP = ("selection", "forward", "backward", "encoders", "update")
ALWAYS = (*STEP, "evaluation")
FORWARD = ("forward", "backward")  # what the forward pass makes for the backward pass
NOTED = ("encoders", "update")


@dataclass(frozen=True)
class MemoryTerm:
    """One kind of memory: its bytes, and the phases of a run in which it is held."""

    name: str
    bytes: int
    phases: tuple[str, ...]
    formula: str


def clt_size(config: TrainConfig, shape: ModelShape) -> CLTSize:
    """The vectors and parameters of the CLT that `config` trains."""
    sites = model_sites(shape.layers, config.clt.attention == "latents")
    across = config.clt.targets == "all"
    targets = tuple(shape.layers - site.layer if site.kind == "mlp" and across else 1 for site in sites)
    upstream = tuple(upstream_modules(sites, i, shape.parallel) for i in range(len(sites)))
    return CLTSize(shape.d_model, config.clt.latents, targets, upstream)


def captured_bytes(config: TrainConfig, shape: ModelShape, tokens: int) -> int:
    """Bytes of the activations that are captured for so many tokens, attention patterns included."""
    L, D, H, number = shape.layers, shape.d_model, shape.heads, number_bytes(config)
    vectors = tokens * (number * D * (1 + 3 * L) + FLOAT * L)
    pattern = L * tokens * (number * config.data.row_tokens * H + FLOAT)
    return vectors + (pattern if config.clt.attention == "latents" else 0)


class RunSizes:
    """The letters of the formulas for one run. n: tokens of a micro-batch; w: bytes of a weight; p: bytes of a number
    that products read; v: bytes of a number of the activations; M: modules; Ks: the most active latents of a token in
    each module; K: the largest of them; active: all of them, K M in the formulas. With `ranks` that share the CLT, or
    `data` of them that share the batch, N and n are the tokens of one rank; F, C and D stay those of the whole CLT.
    `available`: bytes of the device, None: unknown."""

    def __init__(self, config: TrainConfig, shape: ModelShape, available: int | None = None):
        self.config, self.shape, self.size = config, shape, clt_size(config, shape)
        self.available, self.on_gpu = available, resolve(config.device).type == "cuda"
        self.L, self.D, self.F = shape.layers, shape.d_model, config.clt.latents
        by_layer = active_by_layer(config.clt.active, config.clt.active_ratio, self.L, self.F)
        self.sites = model_sites(shape.layers, config.clt.attention == "latents")
        self.Ks = [active_slots(config.clt.activation, by_layer[site.layer], self.F) for site in self.sites]
        self.K, self.active = max(self.Ks), sum(self.Ks)
        self.M = self.size.modules
        self.S = config.data.row_tokens
        self.ranks, self.data = config.parallel.latents or 1, config.parallel.data or 1
        batch_rows = config.batch_rows // self.data
        self.N = batch_rows * self.S
        rows = min(config.compute.micro_batch_rows or batch_rows, batch_rows)
        self.n, self.in_parts = rows * self.S, rows < batch_rows
        self.w, self.v = BYTES[config.clt.dtype], number_bytes(config)
        self.rounds = products(config) is not None
        self.p = BYTES["bf16"] if self.rounds else self.w
        self.mean_number = FLOAT  # of real outputs and of sums over them
        self.model_number = BYTES[config.model.dtype]
        # Of the first of the ranks that share the CLT; the others have none.
        self.own_model = 0 if config.parallel.model_devices else self.model_number * shape.parameters
        self.half = self.model_number < FLOAT
        self.readers = [u for u in self.size.upstream if u]
        self.sparse = config.connections.policy != "none" and bool(self.readers)
        self.modes = 2 if self.sparse else 1
        self.outputs = FLOAT * self.N * self.D * self.M  # reconstructions of one mode
        self.micro_outputs = FLOAT * self.n * self.D * self.M  # of a micro-batch
        self.active_latents = self.modes * (FLOAT + ID) * self.N * self.active
        self.widest = max(self.size.targets)
        c = config.connections
        C = max(c.per_latent, (c.start_per_latent or 0) * (c.policy == "top"))
        self.shares_out = c.budget == "module"
        if self.shares_out:
            C *= MOST
        if c.policy == "dense-learned":
            C = self.M * self.F
        self.learned = c.policy in ("learned", "dense-learned")
        self.exchanging = c.policy == "learned" and c.exchange_share > 0
        # The share of steps that choose connections.
        self.choosing = (self.exchanging or c.policy == "top") * self.sparse / c.refresh_steps
        self.connections = [min(C, u * self.F) for u in self.readers]  # per latent of each reader
        self.slots = self.F * sum(self.connections)
        read = [site for site, u in zip(self.sites, self.size.upstream, strict=True) if u]
        self.heads_of_readers = [shape.heads if site.kind == "attn" else 1 for site in read]
        thresholds = self.M * (config.clt.activation == "jumprelu")
        self.gradients = 4 * self.M + thresholds + self.learned * len(self.readers)  # tensors that have one
