"""Batches of single tokens, out of blocks of captured rows that are shuffled in a buffer of bounded bytes."""

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.costs import BYTES, FLOAT
from sparseclt.data.prefetch import one_ahead
from sparseclt.data.row_stream import RowStream, permutation
from sparseclt.model.activations import Activations
from sparseclt.model.over_ranks import rows_of_all
from sparseclt.parallel import ALONE, Group

Read = Callable[[Tensor], Activations]  # the activations [B, S, ...] of rows [B], given by number
LEAST_BATCHES = 2  # in a block: with a single one, only tokens of the same batch would change places
BESIDE_BLOCKS = 3  # batches: the one in use, the next, and what is being captured for the next block
TOKENS = 1  # in the seed of a block's order; the order of rows has 0 there


def number_bytes(config: TrainConfig) -> int:
    """Bytes of a number of a batch's activations: captured in the model's dtype, read from a cache in float32."""
    return FLOAT if config.activations.cache is not None else BYTES[config.model.dtype]


def token_bytes(layers: int, d_model: int, number: int = FLOAT) -> int:
    """Bytes of one token of a block: activations of `number` bytes a number, scales, its id, its place in the order,
    whether it counts."""
    return number * d_model * (1 + 3 * layers) + FLOAT * layers + 8 + 8 + 1


def block_batches(shuffle_bytes: int, batch_tokens: int, layers: int, d_model: int, number: int = FLOAT) -> int:
    """Batches in a block, so that two blocks and the batches beside them take at most `shuffle_bytes`.

    Raises ValueError if that is less than blocks of 2 batches need.
    """
    batch = batch_tokens * token_bytes(layers, d_model, number)
    batches = (shuffle_bytes // batch - BESIDE_BLOCKS) // 2
    if batches < LEAST_BATCHES:
        raise ValueError(
            f"activations.shuffle_bytes: expected at least {least_bytes(batch_tokens, layers, d_model, number)} (two "
            f"blocks of {LEAST_BATCHES} batches, and {BESIDE_BLOCKS} batches beside them), got {shuffle_bytes}; give "
            f"more, a smaller batch_rows, or 0 for no shuffling"
        )
    return batches


def least_bytes(batch_tokens: int, layers: int, d_model: int, number: int = FLOAT) -> int:
    """The smallest `shuffle_bytes` for such batches."""
    return (2 * LEAST_BATCHES + BESIDE_BLOCKS) * batch_tokens * token_bytes(layers, d_model, number)


def buffer_bytes(
    shuffle_bytes: int, batch_tokens: int, steps: int, layers: int, d_model: int, number: int = FLOAT
) -> int:
    """Bytes that a run of `steps` steps really holds for shuffling: a short run does not fill its blocks."""
    batches = block_batches(shuffle_bytes, batch_tokens, layers, d_model, number)
    return (min(2 * batches, steps) + BESIDE_BLOCKS) * batch_tokens * token_bytes(layers, d_model, number)


def vectors_of(activations: Activations) -> list[Tensor]:
    """The 1 + 3 L tensors [B, S, D]: embedding, MLP inputs, MLP outputs, attention outputs."""
    return [activations.r_0, *activations.x, *activations.mlp_out, *activations.attn_out]


def as_activations(tokens: Tensor, vectors: Tensor, scale: Tensor, counted: Tensor) -> Activations:
    """What `vectors_of` took apart: tokens [B, S], vectors [1 + 3 L, B, S, D], scale [L, B, S], counted [B, S]."""
    L, (r_0, *rest) = len(scale), vectors.unbind(0)
    return Activations(tokens, r_0, rest[:L], list(scale.unbind(0)), rest[L : 2 * L], rest[2 * L :], counted=counted)


class Block:
    """Room for the activations of T tokens on the device of `like`, in its dtype if that has 2 bytes, else in
    float32."""

    def __init__(self, T: int, like: Activations):
        device, parts = like.r_0.device, len(vectors_of(like))
        self.tokens = torch.empty(T, dtype=torch.int64, device=device)
        dtype = like.r_0.dtype if like.r_0.element_size() == 2 else torch.float32
        self.vectors = torch.empty(parts, T, like.r_0.shape[-1], dtype=dtype, device=device)
        self.scale = torch.empty(len(like.scale), T, device=device)
        self.counted = torch.ones(T, dtype=torch.bool, device=device)

    def put(self, start: int, piece: Activations) -> None:
        """Copy the tokens of `piece` in, from place `start`."""
        places = slice(start, start + piece.tokens.numel())
        self.tokens[places] = piece.tokens.flatten()
        for own, tensor in zip(self.vectors, vectors_of(piece), strict=True):
            own[places] = tensor.flatten(0, 1)
        for own, tensor in zip(self.scale, piece.scale, strict=True):
            own[places] = tensor.flatten()
        if piece.counted is not None:
            self.counted[places] = piece.counted.flatten()

    def take(self, chosen: Tensor) -> Activations:
        """A copy of the tokens at places `chosen` [B, S]."""
        at = chosen.flatten().to(self.tokens.device)
        return as_activations(
            self.tokens[at].view(chosen.shape),
            self.vectors.index_select(1, at).unflatten(1, chosen.shape),
            self.scale.index_select(1, at).unflatten(1, chosen.shape),
            self.counted[at].view(chosen.shape),
        )


def shuffled(
    read: Read,
    stream: RowStream,
    steps: range,
    batches: int,
    device: torch.device | None = None,
    data: Group = ALONE,
) -> Iterator[Activations]:
    """One batch [B, S, ...] for each of `steps`, whose tokens stand at random places.

    Block k holds the rows of steps k x `batches` to (k + 1) x `batches`, and gives their tokens out in an order that
    follows from the seed and k: steps that begin elsewhere get the same batches. While one block is in use a thread
    reads the next, in pieces of B rows, into the second of two buffers; on a CUDA `device`, on a stream of its own.

    `data`: the ranks that share the rows of a batch. Each reads its share of them, sends it to the others, so that all
    have the whole block, and is given its share of every batch.

    `stream` is moved about: its position means nothing afterwards.
    """
    B, S = stream.batch_rows, stream.rows.shape[1]
    buffers: dict[int, Block] = {}
    share, closed = data.part(B, "batch_rows"), threading.Event()

    def fill(number: int) -> Block | None:
        count = min(batches, steps.stop - number * batches)
        stream.position = number * batches * B
        for i in range(count):
            if closed.is_set() and data.alone:  # others would wait for this one's rows
                return None
            piece = rows_of_all(read(stream.take()[share]), data)
            if number % 2 not in buffers:
                buffers[number % 2] = Block(count * B * S, piece)
            # The block before last, which was here, has been given out: one_ahead begins this one no sooner.
            buffers[number % 2].put(i * B * S, piece)
        return buffers[number % 2]

    numbers = range(steps.start // batches, -(-steps.stop // batches)) if steps else range(0)
    blocks = one_ahead((fill(number) for number in numbers), device)
    step = steps.start
    try:
        for number, block in zip(numbers, blocks, strict=True):
            last = min((number + 1) * batches, steps.stop)
            order = permutation((last - number * batches) * B * S, stream.seed, number, TOKENS)
            for chosen in order.view(-1, B, S)[step - number * batches :]:
                yield block.take(chosen[share])  # type: ignore[union-attr]
            step = last
    finally:
        closed.set()  # nobody waits for the rest of a block that is not needed any more
        blocks.close()
