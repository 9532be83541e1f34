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
from sparseclt.model.activations import Activations
from sparseclt.parallel import ONE_RANK, Ranks
from sparseclt.training.several_ranks import broadcast, in_turn


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
                self.cache = open_cache(config, language_model, rows)

    @property
    def tokens(self) -> int:
        """Tokens in one batch."""
        return self.config.batch_rows * self.rows.shape[1]

    def capture(self, tokens: Tensor) -> Activations:
        """The model's activations on `tokens` [B, S]: the one run of the model that both modes share."""
        return self.language_model.capture(tokens.to(self.device), attention=self.config.clt.attention == "latents")

    def from_step(self, step: int) -> Iterator[Activations]:
        """One batch for each step from `step` on, prepared one ahead unless the loss and the capture would both run the
        model."""
        if self.ranks.latents.alone:
            return self._own_batches(step)
        source = self._own_batches(step) if self.ranks.latents.rank == 0 else None
        return (
            broadcast(None if source is None else next(source), self.ranks.latents, self.device)
            for _ in range(step, self.config.steps)
        )

    def _own_batches(self, step: int) -> Iterator[Activations]:
        steps, shuffle_bytes = range(step, self.config.steps), self.config.activations.shuffle_bytes
        stream = self.stream_at(step)
        if shuffle_bytes:
            shape = self.language_model.shape
            size = block_batches(shuffle_bytes, self.tokens, shape.layers, shape.d_model, number_bytes(self.config))
            batches = shuffled(self._read, stream, steps, size, self.device)
        else:
            batches = (self._read(stream.take()) for _ in steps)
        if self.config.loss.cross_entropy_weight and not self.cache:
            return batches
        return one_ahead(batches, self.device)

    def stream_at(self, step: int) -> RowStream:
        """The rows of `step` and of the steps behind it."""
        return RowStream(self.rows, self.config.batch_rows, self.config.seed, position=step * self.config.batch_rows)

    def _read(self, chosen: Tensor) -> Activations:
        """The activations of this rank's share of rows `chosen` [B] of the text: from the cache, or captured where
        there is none."""
        chosen = chosen[self.ranks.data.part(len(chosen), "batch_rows")]
        if self.cache:
            return self.cache.read(chosen, self.device)
        return self.capture(self.rows[chosen])
