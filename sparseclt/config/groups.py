"""The groups of a training run's configuration. Shares are fractions of the run's steps, from 0 to 1, unless the text
says otherwise."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sparseclt.config.strict import no_repeats, strict

Importance = Literal["coactivation", "mean", "rms"]
Budget = Literal["latent", "module"]

LARGEST = 2**63 - 1  # the largest int64
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


@strict("model")
class ModelConfig:
    """The language model whose MLPs are replaced."""

    path: Text = "embedded"
    """'embedded' (the small model in the package), a local directory, a GGUF file, or a name on the hub."""
    layers: Positive | None = None
    """Cover only the first so many layers. None: all."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Data type of its weights and activations. bf16, fp16: half the memory. The CLT computes in fp32 all the same."""


@strict("data")
class DataConfig:
    """The text for training and evaluation."""

    source: Text = "embedded"
    """'embedded', a .txt, .jsonl (also .gz or .zst) or .parquet file, a directory of them, or hf:NAME[:CONFIG] for a
    Hugging Face data set."""
    text_field: Text = "text"
    """The field with the text, in JSON lines, Parquet files and data sets."""
    row_tokens: Annotated[int, Field(ge=3, le=LARGEST)] = 128
    """Tokens per row of text."""
    bos: Literal["row", "document", "none"] = "row"
    """row: every row begins with the tokenizer's BOS (else EOS) token, and an EOS (else BOS) token parts documents.
    document: BOS begins every document, and rows begin anywhere. none: no special tokens."""
    max_tokens: Positive | None = None
    """Stop reading the text after so many tokens. None: read it all."""
    held_out_tokens: Positive = 65_536
    """Tokens for evaluation."""
    held_out_share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the documents to hold out if the source has no held-out split of its own."""
    cache: Text | None = None
    """Directory that keeps the token ids of a text for later runs. None: sparseclt/tokens in the Hugging Face cache."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < self.row_tokens:
            raise ValueError(
                f"data.max_tokens: expected at least data.row_tokens = {self.row_tokens}, got {self.max_tokens}"
            )


@strict("clt")
class CLTConfig:
    """The shape of the transcoder."""

    latents: Positive = 1024
    """Latents per module (F)."""
    active: Positive = 32
    """Active latents per token and module (K), in the mean over layers, and over tokens except with activation topk."""
    active_ratio: Annotated[float, Field(gt=0)] = 2.0
    """K of the first layer over that of the last, between which it falls geometrically. Later layers inherit in
    sparsely-connected mode what earlier ones fail to reconstruct."""
    activation: Literal["topk", "batchtopk", "jumprelu"] = "topk"
    """topk: the K strongest latents of each token. batchtopk: the N K strongest of a batch of N tokens. jumprelu: those
    above a trained threshold per latent. With the latter two, K on average and at most 4 K per token."""
    bandwidth: Annotated[float, Field(gt=0)] = 0.1
    """With activation jumprelu, width of the pre-activations around a threshold from which it learns."""
    targets: Literal["all", "own"] = "all"
    """The MLP outputs that a latent writes to. all: those of its own and all later layers. own: that of its own layer,
    as in per-layer transcoders."""
    attention: Literal["frozen", "latents"] = "frozen"
    """frozen: the model's own attention outputs are taken as given. latents: attention gets latents of its own."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Data type of the weights. bf16: half the memory; updates are rounded stochastically."""

    def __post_init__(self) -> None:
        if self.active > self.latents:
            raise ValueError(f"clt.active: expected at most clt.latents = {self.latents}, got {self.active}")
        if self.dtype != "fp32" and self.attention == "latents":
            raise ValueError(f"clt.dtype: expected 'fp32' with clt.attention 'latents', got {self.dtype!r}")


@strict("connections")
class ConnectionConfig:
    """The upstream latents that each latent may read in sparsely-connected mode; the first two fields matter most."""

    policy: Literal["top", "learned", "dense-learned", "random", "none"] = "top"
    """top: the C most important latents, chosen again and again. learned: a trained gate for each of C candidates,
    which give way to better ones. dense-learned: a gate for each pair of latents (small models only). random: C at
    random. none: vanilla mode only."""
    per_latent: Natural = 8
    """Connections per latent (C), 0 for none at all; with policy learned, candidates per latent."""
    budget: Budget = "latent"
    """With policy top, who has per_latent connections. latent: each latent. module: its latents in the mean, and each
    at most four times as many; those have more that would miss them most."""
    importance: Importance = "coactivation"
    """What makes an upstream latent important, besides the size of its virtual weight |V|.
    coactivation: its mean while the reading latent fires. mean: over all tokens. rms: its root mean square."""
    recent_tokens: Positive = 16_384
    """The most recent tokens, over which co-activation is measured."""
    start_per_latent: Positive | None = None
    """With policy top, connections per latent at first: C falls from here geometrically. None: it does not fall."""
    anneal_share: Share = 0.5
    """With policy top, share of the steps over which C falls."""
    refresh_steps: Positive = 50
    """With policy top, steps from one choice of connections to the next; with policy learned, from one exchange of
    candidates."""
    freeze_after_share: Share = 1.0
    """With policy top, share of the steps after which the connections no longer change, and with policy learned the
    candidates."""
    exchange_share: Share = 0.5
    """With policy learned, largest share of a latent's candidates that are exchanged every refresh_steps, for upstream
    latents whose connection would lower the loss by more than its price. None are in the last quarter of the steps.
    0: the first candidates stay."""
    open_per_latent: Annotated[float, Field(gt=0)] | None = None
    """With the learned policies, connections per latent that should be open in the end, a mean over latents: the
    pressure is steered towards it. None: pressure_weight stays as it is."""
    candidates_after_steps: Natural = 50
    """With policy learned, steps before the candidates are chosen."""
    pressure_weight: Weight = 1e-3
    """With the learned policies, the price of each connection that a latent is expected to keep open."""

    def __post_init__(self) -> None:
        if self.budget == "module" and (self.policy, self.importance) != ("top", "coactivation"):
            raise ValueError(
                f"connections.budget: expected 'latent' unless connections.policy is 'top' and connections.importance "
                f"'coactivation', got {self.budget!r} with {self.policy!r} and {self.importance!r}"
            )
        if self.start_per_latent is not None and self.start_per_latent < self.per_latent:
            raise ValueError(
                f"connections.start_per_latent: expected at least connections.per_latent = {self.per_latent} or None, "
                f"got {self.start_per_latent}"
            )


@strict("loss")
class LossConfig:
    """For experts: the weights of the loss terms, and when sparsely-connected mode begins."""

    sparse_start_share: Share = 0.2
    """Share of the steps that train vanilla mode only, before connections are first chosen."""
    sparse_ramp_share: Share = 0.2
    """Share of the steps, from then on, over which the terms of sparsely-connected mode grow to full weight."""
    latent_agreement_weight: Weight = 0.2
    """Weight of the FVU of the sparsely-connected latents against the vanilla ones."""
    l0_weight: Weight = 1.0
    """With activation jumprelu, weight of (active latents per token / K - 1)^2 of each module and mode."""
    interaction_weight: Weight = 0.0
    """Weight of the mean |Jacobian| between latents that are active together, in vanilla mode, summed over MLP modules;
    it grows with the terms of sparsely-connected mode. A baseline after Jacobian SAEs for small models: the memory
    plan leaves out what it takes. 0: not computed."""
    cross_entropy_weight: Weight = 0.0
    """Weight of the replaced model's next-token cross-entropy, in each mode. 0: not computed."""


@strict("optimizer")
class OptimizerConfig:
    """For experts: Adam, with a linear warm-up and a linear decay to zero."""

    learning_rate: Weight = 4e-3
    """Peak learning rate. 4e-3 suits 512 tokens per step, at any F; the best rate grows with their square root."""
    warmup_share: Share = 0.02
    """Share of the steps, at the start, over which the learning rate rises."""
    decay_share: Share = 0.5
    """Share of the steps, at the end, over which it falls to zero."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of Adam's two running means."""
    revival_rate: Weight = 5.0
    """The bias of a dead latent rises by so many peak learning rates per step, until it fires. 0: never. Of attention
    modules only latents that are dead in vanilla mode."""
    dead_after_tokens: Positive | None = None
    """A latent is dead after so many tokens on which it did not fire, in either mode. None: 110 times those on which an
    average latent of its module fires once."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Scale gradients down to this norm at most, in units in which every site's inputs and outputs have size 1. None:
    never."""
    state: Literal["fp32", "8bit"] = "fp32"
    """Precision of Adam's moments. fp32: 8 bytes per parameter. 8bit: 2 for encoders and decoders, and some scales."""
    rows: Literal["all", "fired", "touched"] = "fired"
    """Rows that a step moves. all: every one, as Adam does. fired: encoder rows that have a gradient, because their
    latent fired, and all decoder rows; far fewer latents die than with all. touched: as fired, but of decoders only
    rows that a latent or a connection touched, which takes less time where these are few."""


@strict("activations")
class ActivationConfig:
    """For experts: the source and the order of the activations."""

    shuffle_bytes: Natural = 0
    """Size of a buffer that shuffles the tokens of many rows, in bytes. 0: a batch is whole rows of text."""
    cache: Text | None = None
    """Directory that holds the activations of all training rows; written first if absent.
    None: run the language model in each step."""
    cache_dtype: Literal["bf16", "int8"] = "bf16"
    """Data type of the cache on disk. int8: half the bytes, with one scale per token and vector."""


@strict("compute")
class ComputeConfig:
    """For experts: how a step is computed; the result is the same up to rounding."""

    micro_batch_rows: Positive | None = None
    """The most rows that go forward and backward at a time; the gradient is still that of the whole step.
    None: all rows, which saves a forward pass."""
    backend: Literal["reference", "torch", "numba", "triton"] | None = None
    """Backend of the ops. None: the best one installed for the device (resumed runs need the same one)."""
    precision: Literal["fp32", "bf16"] | None = None
    """bf16: products with encoders and decoders round what they multiply to bf16, and add up in fp32; weights, biases,
    norms, losses and Adam stay in fp32. fp32: nothing is rounded. None: bf16 on a GPU that has it, fp32 elsewhere and
    with attention latents (resumed runs need the same one)."""

    def __post_init__(self) -> None:
        if self.precision == "bf16" and self.backend == "numba":
            raise ValueError(
                "compute.precision: expected 'fp32' or None with compute.backend 'numba', which has no bf16, got 'bf16'"
            )


@strict("logging")
class LoggingConfig:
    """For experts: what a run writes and shows while it trains."""

    every_steps: Positive = 10
    """Steps from one line of metrics.jsonl to the next."""
    loggers: Annotated[tuple[Literal["wandb", "trackio", "tensorboard"], ...], AfterValidator(no_repeats)] = ()
    """Loggers to use besides metrics.jsonl."""
    progress: bool = True
    """Show a progress bar."""


@strict("checkpoints")
class CheckpointConfig:
    """For experts: how often a run is saved, and how many checkpoints stay."""

    every_steps: Positive = 500
    """Steps from one checkpoint to the next; the last step always writes one."""
    every_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which a checkpoint is due as well. None: only by steps."""
    keep: Positive = 2
    """How many of the newest checkpoints stay on disk."""
