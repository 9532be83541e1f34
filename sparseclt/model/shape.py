"""The shapes of the language model and of the CLT on top of it: stated once, read by everything else."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise
from typing import Annotated, Any, Literal

from pydantic import Field

from sparseclt.config.strict import from_json_values, strict

Natural = Annotated[int, Field(ge=0)]


@strict()
class ModelShape:
    """The facts about a language model on which a CLT, its memory plan and a cache of activations depend."""

    layers: Natural = 0
    """Layers that the CLT covers (L); 0: read the whole shape from the configuration of the model that is named."""
    d_model: Natural = 0
    """Width of the residual stream (D)."""
    heads: Natural = 0
    """Attention heads (H); only attention latents need them."""
    parameters: Natural = 0
    """Parameters of the language model."""
    parallel: bool = False
    """Whether attention and MLP of a block read the same residual stream."""
    centred: bool = True
    """Whether the norms subtract the mean over D (LayerNorm does, RMSNorm does not)."""
    mlp_input: str = "ln2.hook_normalized"
    """The TransformerLens hook of what a block's MLP reads: ln1's where both read one norm, mlp.hook_in without any."""
    context: int | None = None
    """Longest row of tokens that the model takes; None: no limit."""
    vocab: Natural = 0
    """Tokens in the vocabulary."""
    name: str = ""
    """The model's name or path, as it was given."""


ROOM = 4  # the most active latents of a token over their mean


def active_by_layer(active: int, ratio: float, layers: int, latents: int) -> list[int]:
    """K of each layer's modules: falling geometrically, the first `ratio` times the last, `active` in the mean."""
    weights = [ratio ** (-layer / max(1, layers - 1)) for layer in range(layers)]
    shares = [active * layers * weight / sum(weights) for weight in weights]
    until = [round(total) for total in accumulate(shares, initial=0.0)]  # so that the sum is exact
    return [min(max(1, b - a), latents) for a, b in pairwise(until)]


def ratio_of(active: Sequence[int]) -> float | None:
    """The ratio with which `active_by_layer` gives these K; None if there is none."""
    layers, low, high = len(active), min(active), max(active)
    if sum(active) % layers:
        return None
    ends = active[0] / active[-1]
    # What is rounded to these whole numbers lies around their quotient.
    near = (ends * (1 + step / (400 * low)) for n in range(801) for step in (n, -n) if step / (400 * low) > -1)
    mean = sum(active) // layers
    return next((ratio for ratio in near if active_by_layer(mean, ratio, layers, high) == [*active]), None)


def active_slots(activation: str, active: int, latents: int, room: int = ROOM) -> int:
    """The most active latents of a token, for K = `active` and F = `latents`: see `Architecture.slots_of`."""
    return active if activation == "topk" else min(room * active, latents)


@strict()
class Architecture:
    """The shape of a CLT: that of its language model, F latents per module, K of them active per token.

    `activation`: with "topk" each token has its K strongest latents. With "batchtopk" and "jumprelu" K is a mean, and a
    token has at most `slots_of`, `room` times K: see `model.nonlinearity`. `bandwidth`: that of `ops.jumprelu_encode`,
    for training.

    `active`: K, in the mean over layers. `active_ratio`: K of the first layer over that of the last (`active_of`). What
    an early layer fails to reconstruct, all later ones inherit in sparsely-connected mode.

    `attention`: what stands for attention in sparsely-connected mode. "frozen": the model's real attention outputs;
    "latents": modules of their own.

    `targets`: the MLP outputs that an MLP's latents write to. "all": those of their own and all later layers; "own":
    that of their own layer, as in a set of per-layer transcoders.

    Raises ValueError for sizes below 1 and for K above F.
    """

    model: ModelShape
    latents: int
    active: int
    attention: Literal["frozen", "latents"] = "frozen"
    activation: Literal["topk", "batchtopk", "jumprelu"] = "topk"
    bandwidth: float = 0.1
    room: int = ROOM
    targets: Literal["all", "own"] = "all"
    active_ratio: float = 1.0

    def active_of(self, layer: int) -> int:
        """K of the modules of `layer`."""
        return active_by_layer(self.active, self.active_ratio, self.model.layers, self.latents)[layer]

    def slots_of(self, layer: int) -> int:
        """The most active latents of a token in `layer`: K with "topk", otherwise `room` times K, or F if that is
        less."""
        return active_slots(self.activation, self.active_of(layer), self.latents, self.room)

    @property
    def slots(self) -> int:
        """The most active latents of a token in any layer."""
        return max(map(self.slots_of, range(self.model.layers)))

    def targets_of(self, layer: int) -> int:
        """T, the number of MLP outputs that the MLP module of `layer` writes to."""
        return self.model.layers - layer if self.targets == "all" else 1

    def __post_init__(self) -> None:
        sizes = {"layers": self.model.layers, "d_model": self.model.d_model, "room": self.room}
        for name, size in (sizes | {"latents": self.latents, "active": self.active}).items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if self.active > self.latents:
            raise ValueError(f"active: expected at most latents = {self.latents}, got {self.active}")
        if not self.active_ratio > 0:
            raise ValueError(f"active_ratio: expected more than 0, got {self.active_ratio}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written beside the weights."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Architecture":
        """The reverse of `to_dict`. Raises ConfigError for unknown fields and values of other types."""
        return from_json_values(cls, values)
