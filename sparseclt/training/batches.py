"""The batches of a run: captured from the language model, shuffled, or read from a cache."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.data.activation_cache import open_cache
from sparseclt.data.activation_stream import block_batches, number_bytes, shuffled
from sparseclt.data.prefetch import one_ahead
from sparseclt.data.row_stream import RowStream
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.language_model.over_ranks import held_here
from sparseclt.model.activations import Activations
from sparseclt.model.over_ranks import broadcast
from sparseclt.parallel import ONE_RANK, Ranks
from sparseclt.training.several_ranks import in_turn


class Batches:
    """Activations of the training rows [R, S], in an order that depends on the seed and the step only.

    `ranks`: ranks that share the data have consecutive rows of each batch. Of those that share the CLT the first one
    runs the language model, or reads the cache, and sends the others what it found.
    """

    def __init__(
        self,
        config: TrainConfig,
        language_model: LanguageModel,
        rows: Tensor,
        device: torch.device,
        ranks: Ranks = ONE_RANK,
    ):
        self.config, self.language_model, self.rows, self.device = config, language_model, rows, device
        self.ranks = ranks
        self.stream_at(0)  # raises for rows that cannot be batched, before anything is written
        self.cache = None
        if config.activations.cache is not None:
            with in_turn(ranks):
                if (model := held_here(language_model)) is not None:
                    self.cache = open_cache(config, model, rows)

    @property
    def tokens(self) -> int:
        """Tokens in one batch."""
        return self.config.batch_rows * self.rows.shape[1]

    def capture(self, tokens: Tensor) -> Activations:
        """The model's activations on `tokens` [B, S]: the one run of the model that both modes share."""
        model = held_here(self.language_model)
        assert model is not None  # on the first of the ranks that share the CLT
        found = model.capture(tokens.to(model.device), attention=self.config.clt.attention == "latents")
        return found.to(self.device)

    def from_step(self, step: int) -> Iterator[Activations]:
        """One batch for each step from `step` on, prepared and sent to other ranks one ahead, unless the loss and the
        capture would both run the model."""
        steps, latents = range(step, self.config.steps), self.ranks.ahead.latents
        own = self._own_batches(steps) if latents.rank == 0 else None
        batches = own or iter(())
        if not latents.alone:
            batches = (broadcast(None if own is None else next(own), latents, self.device) for _ in steps)
        if self.config.loss.cross_entropy_weight and self.config.activations.cache is None:
            return batches
        return one_ahead(batches, self.device)

    def _own_batches(self, steps: range) -> Iterator[Activations]:
        """This rank's rows of the batches."""
        shuffle_bytes, data = self.config.activations.shuffle_bytes, self.ranks.ahead.data
        stream = self.stream_at(steps.start)
        if shuffle_bytes:
            shape = self.language_model.shape
            size = block_batches(shuffle_bytes, self.tokens, shape.layers, shape.d_model, number_bytes(self.config))
            return shuffled(self._read, stream, steps, size, self.device, data)
        share = data.part(self.config.batch_rows, "batch_rows")
        return (self._read(stream.take()[share]) for _ in steps)

    def stream_at(self, step: int) -> RowStream:
        """The rows of `step` and of the steps behind it."""
        return RowStream(self.rows, self.config.batch_rows, self.config.seed, position=step * self.config.batch_rows)

    def _read(self, chosen: Tensor) -> Activations:
        """The activations of rows `chosen` [B] of the text: from the cache, or captured where there is none."""
        if self.cache:
            return self.cache.read(chosen, self.device)
        return self.capture(self.rows[chosen])
