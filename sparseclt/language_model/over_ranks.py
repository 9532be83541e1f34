"""One language model for several ranks: the first of them has it, and the others follow its runs."""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparseclt.language_model.hooks import Replace
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations, of_whole_rows
from sparseclt.model.attention import AttentionWeights
from sparseclt.model.over_ranks import broadcast
from sparseclt.parallel import Group, from_first

# What a run finds out layer by layer, in the fields of `Activations`.
LISTS = tuple(field.name for field in fields(Activations) if field.default_factory is list)


class LanguageModelOfRanks(LanguageModel):
    """A language model that only rank 0 of a group has in memory. The ranks call `capture`, `cross_entropy` and
    `attention_weights` together, with the same arguments, and all have the results, on their own `device`."""

    def __init__(self, model: LanguageModel | None, group: Group, device: torch.device):
        """`model`: the language model, on the first rank; None on the others."""
        self._model, self.group, self._device = model, group, device
        facts = None if model is None else (model.shape, model.tokenizer, model.dtype, model.digest())
        self.shape, self.tokenizer, self.dtype, self._weights = group.objects(facts)[0]

    @property
    def device(self) -> torch.device:
        """Where the results are."""
        return self._device

    def digest(self) -> str:
        weights: str = self._weights
        return weights

    def capture(self, tokens: Tensor, *, attention: bool = False) -> Activations:
        found = None
        if self._model is not None:
            found = self._model.capture(tokens.to(self._model.device), attention=attention).to(self._device)
        return broadcast(found, self.group, self._device)

    def attention_weights(self, layer: int) -> AttentionWeights:
        found = None if self._model is None else self._model.attention_weights(layer)
        own = None if found is None else [t.to(self._device) for t in (found.W_V, found.W_O, found.bias)]
        _, (W_V, W_O, bias) = from_first(self.group, self._device, own)
        return AttentionWeights(W_V, W_O, bias, self.shape.centred)

    def cross_entropy(self, tokens: Tensor, *, on_mlp: Replace | None = None, on_attn: Replace | None = None) -> Tensor:
        """As that of the model. `on_mlp` and `on_attn` are called on all ranks, with the activations of the first one's
        run. Each rank differentiates its share of the result."""
        replace = {"mlp_out": on_mlp, "attn_out": on_attn}
        run = _FollowedRun(tokens.to(self._device), self.shape.mlp_input, self.group, self._device, replace)
        if self._model is None:
            return run.follow()
        on = {f"on_{kind.removesuffix('_out')}": partial(run.lead, kind) for kind, own in replace.items() if own}
        return run.end(self._model.cross_entropy(tokens.to(self._model.device), **on).to(self._device))


def held_here(model: LanguageModel) -> LanguageModel | None:
    """The language model itself, if this process has it."""
    return model._model if isinstance(model, LanguageModelOfRanks) else model


class _FollowedRun:
    """A replaced run of the model on the first rank. `live` has its activations as far as it has come, on all ranks;
    `replace`: by field of `Activations`, the function that replaces these outputs."""

    def __init__(
        self, tokens: Tensor, mlp_input: str | None, group: Group, device: torch.device, replace: dict[str, Any]
    ):
        self.group, self.device, self.replace = group, device, replace
        self.live = of_whole_rows(tokens, mlp_input)
        self._begun = False
        self._replaced: list[Tensor] = []

    def lead(self, kind: str, layer: int, running: Activations) -> Tensor:
        """On the first rank, in a hook of the model: send what is new in `running`, and replace an output."""
        new = {name: getattr(running, name)[len(getattr(self.live, name)) :] for name in LISTS}
        own = [tensor.to(self.device) for tensors in new.values() for tensor in tensors]
        if not self._begun:
            own.insert(0, running.r_0.to(self.device))
        counts = {name: len(tensors) for name, tensors in new.items()}
        self._take(counts, from_first(self.group, self.device, own, (kind, layer, counts))[1])
        return self._replace(kind, layer).to(running.r_0.device)

    def end(self, value: Tensor) -> Tensor:
        """On the first rank: what the run came to."""
        return from_first(self.group, self.device, [value])[1][0]

    def follow(self) -> Tensor:
        """On the other ranks: the same as `lead`, until the run has ended; what it came to."""
        while True:
            call, found = from_first(self.group, self.device, None, behind=self._replaced)
            if call is None:
                return found[0]
            if any(tensor.requires_grad for tensor in found):
                self._replaced = []  # a backward pass reaches them from here
            kind, layer, counts = call
            self._take(counts, found)
            self._replaced.append(self._replace(kind, layer))

    def _take(self, counts: dict[str, int], found: list[Tensor]) -> None:
        tensors = iter(found)
        if not self._begun:
            self.live.r_0, self._begun = next(tensors), True
        for name, count in counts.items():
            getattr(self.live, name).extend(next(tensors) for _ in range(count))

    def _replace(self, kind: str, layer: int) -> Tensor:
        outputs = getattr(self.live, kind)
        outputs[-1] = self.replace[kind](layer, self.live)
        replaced: Tensor = outputs[-1]
        return replaced
