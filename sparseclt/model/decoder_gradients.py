"""Decoder gradients that are never all in memory.

The decoders are most of a CLT. Their gradient is a sum of a few sparse parts: what active latents wrote, and what
virtual weights read. The backward pass only notes these parts, which are no larger than the activations; `chunks` then
computes the gradient of one decoder some rows at a time, for an optimiser that updates those rows and drops it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseclt import ops
from sparseclt.devices import Budget
from sparseclt.model import decoder_kernels
from sparseclt.model.attention import centre, head_rows
from sparseclt.model.cross_layer import Reader, effective_decoders
from sparseclt.model.modules import Latents
from sparseclt.model.rounding import SharedRounding
from sparseclt.model.sections import cut
from sparseclt.model.transcoders import Transcoders
from sparseclt.ops import rows as products
from sparseclt.ops.backend import choose
from sparseclt.ops.optimizer_step import Written
from sparseclt.ops.rows import Transpose, accumulation_dtype, chunks, transpose
from sparseclt.parallel.collectives import columns_of, gather_rows, rows_of

CHUNK_BYTES = Budget(cpu=8 << 20, gpu=64 << 20, gpu_share=1 / 64)  # of gradient in memory at a time, with its parts


class Read(NamedTuple):
    """What the virtual weights of one reader, or of one of its heads, read of decoders: their gradient dV [F, C], the
    reader's encoder rows [F, D], and what carries a sum of those to where it meets a decoder row. In a group of n
    ranks, [F, D/n] of rows that have been carried there."""

    dV: Tensor
    rows: Tensor
    carry: Callable[[Tensor], Tensor]


class Chunk(NamedTuple):
    """Some rows of a decoder, their gradient [R, T, D], and whether any latent or connection touches each [R]."""

    rows: slice
    gradient: Tensor
    touched: Tensor


def squares_by_target(gradient: Tensor) -> Tensor:
    """[T]: the sums of squares of a decoder's gradient [F, T, D], or of some of its rows."""
    return torch.linalg.vector_norm(gradient, dim=(0, 2)).square()  # without a tensor of squares


class DecoderGradients:
    """Gathers the parts of every decoder's gradient during backward passes, for one optimiser step.

    Equivalent, once `.backward()` is through, to the `.grad` of each module's `W_dec`: `chunks(i)` gives its rows.
    Encoders get the gradient through virtual weights from `add_to_encoders`, which on several ranks comes before the
    first chunk. Between the passes and the last chunk the weights must not change, except for the decoders that
    `chunks` is done with. Where ranks share a batch, gradients are those of the whole batch; decoders are this rank's
    columns.
    """

    def __init__(self, clt: Transcoders, backend: str | None = None, chunk_bytes: int | None = None):
        self.clt, self.backend = clt, backend
        self.chunk_bytes = chunk_bytes or CHUNK_BYTES.on(clt.transcoder(0).W_dec.device)
        self.readers = clt.readers()
        self.dtype = accumulation_dtype(clt.transcoder(0).W_dec.dtype)  # of the chunks
        self.written: list[list[Written]] = [[] for _ in clt]
        self.read: dict[int, Tensor] = {}  # by reader: gradient of its virtual weights
        self._reads: dict[int, list[Read]] = {}  # by reader: the same of all ranks' rows, once that is exchanged
        self._kernels: dict[int, Any] = {}  # by module: the decoder of csrc_triton.decoder_gradient, or numba's
        self.means: dict[int, Tensor] = {}  # by reader: of its encoder's rows
        self._decoders: dict[int, Tensor] = {}  # by module: as products read them, until the last backward pass
        self._round = SharedRounding()

    def decoder(self, index: int) -> Tensor:
        """Module `index`'s decoder as products read it, without a gradient. A rounded copy is made once a step."""
        if index not in self._decoders:
            self._decoders[index] = self.clt.rounded(self.clt.transcoder(index).W_dec.detach())
        return self._decoders[index]

    def decode(self, index: int, latents: Latents) -> tuple[Tensor, ...]:
        """What the latents of module `index` write to each target, [N, D] each, without bias; in fp32 at least."""
        values = latents.values.to(self.decoder(index).dtype)
        result: tuple[Tensor, ...] = _Decode.apply(values, latents.indices, self, index)
        return result

    def virtual_weights(self) -> list[Tensor | None]:
        """As `Transcoders.virtual_weights`, except that the gradient stops here and is noted."""
        with torch.no_grad():
            weights = self.clt.unmasked_virtual_weights(self.backend)
        return self.clt.masked([V if V is None else self._noted(i, V) for i, V in enumerate(weights)])

    def _noted(self, index: int, V: Tensor) -> Tensor:
        """`V` of module `index` as a leaf whose gradient is noted here."""

        def note(grad: Tensor) -> None:
            self.read[index] = self.read[index] + grad if index in self.read else grad

        V = V.detach().requires_grad_()
        V.register_hook(note)
        return V

    def add_to_encoders(self) -> None:
        """Add to every encoder's `.grad` what it gets through virtual weights. Once, after the last backward pass."""
        self._decoders.clear()
        decoders = [module.W_dec.detach() for module in self.clt]
        readers = [reader for reader in self.readers if reader.index in self.read]
        for reader in readers:
            self.read[reader.index] = self.clt.ranks.data.sum_(self.read[reader.index])
        for reader, E in effective_decoders(readers, self.clt.sites, decoders):
            assert reader.all_connections is not None
            W_enc = self.clt.transcoder(reader.index).W_enc
            for (dV, _, _), (carry, _) in zip(self._reads_of(reader), self._heads(reader), strict=True):
                read = products.gather_sum(dV.to(E.dtype), reader.all_connections.indices, E, backend=self.backend)
                read = read if reader.group.alone else rows_of(read, reader.group)
                with torch.enable_grad():
                    carry(W_enc).backward(read.to(W_enc.dtype), inputs=[W_enc])

    def _reads_of(self, reader: Reader) -> list[Read]:
        if reader.index not in self._reads:
            self._reads[reader.index] = [self._exchanged(reader, carry, dV) for carry, dV in self._heads(reader)]
        return self._reads[reader.index]

    def _exchanged(self, reader: Reader, carry: Callable[[Tensor], Tensor], dV: Tensor) -> Read:
        W_enc = self.clt.transcoder(reader.index).W_enc.detach()
        if reader.group.alone:
            return Read(dV, W_enc, carry)
        return Read(gather_rows(dV, reader.group), columns_of(carry(W_enc), reader.group), torch.clone)

    def squares(self, index: int) -> Tensor:
        """[T]: the sums of squares of module `index`'s decoder gradient, by target."""
        if (kernel := self._kernel(index) or self.gathered(index)) is not None:
            squares: Tensor = kernel.squares()
            return squares
        return torch.stack([squares_by_target(chunk.gradient) for chunk in self.chunks(index)]).sum(0)

    def gathered(self, index: int) -> Any:
        """The numba backend's `Decoder` of module `index`, which takes the optimiser's step with a gradient that is
        never stored; None where `_kernel` would be, too."""
        return self._kernel(index, "numba")

    def _kernel(self, index: int, backend: str = "triton") -> Any:
        """What computes module `index`'s gradient in one launch, or a target at a time; None on another backend, on
        several ranks, where attention reads, whose heads it does not carry back, and where a loss reads the decoder
        itself."""
        W_dec, readers = self.clt.transcoder(index).W_dec, self._read_by()
        more = W_dec.grad is not None or any(r.attention for r in readers) or not self.clt.ranks.world.alone
        written = self.written[index]
        rounded = any(grad.dtype != W_dec.dtype for note in written for grad in note.grads)
        used = readers or written if backend == "triton" else written and not rounded  # numba has no bf16
        if choose("decoder_gradient", self.backend, W_dec) != backend or more or not used:
            return None
        if index not in self._kernels:
            self._kernels[index] = decoder_kernels.make(self, index, backend)
        return self._kernels[index]

    def _read_by(self) -> list[Reader]:
        return [reader for reader in self.readers if reader.index in self.read]

    def behind(self, index: int) -> list[Reader | None]:
        """By target of module `index`, and of every later layer: the MLP reader behind it, which meets the sum up to
        there."""
        site, layers = self.clt.sites[index], self.clt.architecture.model.layers
        by_layer = {reader.site.layer: reader for reader in self._readers_of(index)}
        return [by_layer.get(layer) for layer in range(site.layer + 1, layers + 1)]

    def chunks(self, index: int) -> Iterator[Chunk]:
        """The gradient of module `index`'s decoder, all of it, some rows at a time."""
        F, T, D = self.clt.transcoder(index).W_dec.shape
        if (kernel := self._kernel(index)) is not None:
            for rows in chunks(F, T * D * 4, self.chunk_bytes):
                yield Chunk(rows, *kernel.rows(rows))
            return
        parts = [
            (values.to(self.dtype), torch.stack(grads, 1).flatten(1).to(self.dtype))
            for values, _, grads in self.written[index]
        ]
        slices = list(chunks(F, (T + 3) * D * 4, self.chunk_bytes))
        orders = self._sections(index, slices[0].stop)
        for number, rows in enumerate(slices):
            sections = [(values, order[number], bags) for (values, bags), order in zip(parts, orders[0], strict=True)]
            size = rows.stop - rows.start
            gradient, touched = self._sum(sections, size, T * D)
            gradient = self.clt.ranks.data.sum_(gradient).view(size, T, D)
            touched = self.clt.ranks.data.max_(touched) | self._add_read(
                gradient, index, [o[number] for o in orders[1]]
            )
            touched |= self._add_direct(gradient, index, rows)
            yield Chunk(rows, gradient, touched)

    def _sections(self, index: int, size: int) -> tuple[list[list[Transpose]], list[list[Transpose]]]:
        """The slots of what module `index` wrote, by pass, and those of its readers, in chunks of `size` rows."""
        F = self.clt.architecture.latents
        written = [transpose(w.indices, F) for w in self.written[index]]
        read = [r.all_connections.transposed for r in self._readers_of(index) if r.all_connections is not None]
        found = cut([*written, *read], [0] * len(written) + [index * F] * len(read), F, size)
        return found[: len(written)], found[len(written) :]

    def _readers_of(self, index: int) -> list[Reader]:
        return [reader for reader in self._read_by() if reader.upstream_modules > index]

    def _add_direct(self, gradient: Tensor, index: int, rows: slice) -> Tensor:
        """Add, in place, what autograd left in `.grad`: that of a loss which reads the decoder itself. Which rows it
        touches."""
        direct = self.clt.transcoder(index).W_dec.grad
        if direct is None:
            return torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)
        gradient += direct[rows]
        return direct[rows].flatten(1).ne(0).any(1)

    def _heads(self, reader: Reader) -> Iterator[tuple[Callable[[Tensor], Tensor], Tensor]]:
        """(what carries encoder rows [R, D] to where they meet a decoder row, dV [F, C]): one, or one per head of an
        attention reader."""
        dV, weights = self.read[reader.index], reader.attention
        if weights is None:
            yield (centre if self.clt.architecture.model.centred else torch.clone), dV
            return
        for head in range(len(weights.W_V)):
            yield partial(head_rows, weights=weights, head=head), dV[head]

    def _sum(self, parts: list[tuple[Tensor, Transpose, Tensor]], size: int, width: int) -> tuple[Tensor, Tensor]:
        """Sum [R, width] of the parts' weighted bags, and which rows have any."""
        device, total = self.clt.transcoder(0).W_dec.device, None
        touched = torch.zeros(size, dtype=torch.bool, device=device)
        for weights, order, bags in parts:
            part = products.transposed_gather_sum(weights, order, bags, backend=self.backend)
            total = part if total is None else total.add_(part)
            touched |= order.bounds().diff() > 0
        if total is None:
            total = torch.zeros(size, width, dtype=self.dtype, device=device)
        return total, touched

    def _add_read(self, gradient: Tensor, index: int, orders: list[Transpose]) -> Tensor:
        """Add what virtual weights read of these rows, in place; which rows are read. A reader meets the sum of what
        a module wrote before it, so the gradient of a slice is a sum over the readers behind that slice's target."""
        site, D = self.clt.sites[index], gradient.shape[-1]
        touched = torch.zeros(len(gradient), dtype=torch.bool, device=gradient.device)
        readers = self._readers_of(index)
        by_reader = {reader.index: order for reader, order in zip(readers, orders, strict=True)}
        if not readers:
            return touched
        behind = torch.zeros(len(gradient), D, dtype=gradient.dtype, device=gradient.device)

        def take(layer_readers: list[Reader]) -> None:
            for reader in layer_readers:
                order = by_reader[reader.index]
                for dV, encoder, carry in self._reads_of(reader):
                    # Linear: rows are added up first, and carried to the decoder then.
                    total, some = self._sum([(dV, order, encoder)], len(gradient), D)
                    behind.add_(carry(total))
                    touched.logical_or_(some)

        if site.kind == "attn":
            take(readers)
            gradient[:, 0] += behind
            return touched
        for layer in reversed(range(site.layer, self.clt.architecture.model.layers)):
            take([reader for reader in readers if reader.site.layer == layer + 1])
            if layer - site.layer < gradient.shape[1]:
                gradient[:, layer - site.layer] += behind
        return touched


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, notes: DecoderGradients, index: int) -> tuple[Tensor, ...]:
        ctx.save_for_backward(values, indices)
        ctx.notes, ctx.index = notes, index
        written = ops.sparse_decode(values, indices, notes.decoder(index), backend=notes.backend)
        return written.to(notes.dtype).unbind(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, indices = ctx.saved_tensors
        notes, index = ctx.notes, ctx.index
        W_dec = notes.decoder(index).flatten(1)
        rounded = tuple(notes._round(grad, W_dec.dtype) for grad in grads)
        # Detached: with their graph, which holds the notes, neither would ever be freed.
        notes.written[index].append(Written(values.detach(), indices, tuple(grad.detach() for grad in rounded)))
        d_values = products.row_dots(torch.stack(rounded, 1).flatten(1), indices, W_dec, backend=notes.backend)
        return d_values, None, None, None
