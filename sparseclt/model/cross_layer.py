"""Virtual weights between modules: effective decoders as running prefix sums over the reader's layer.

A reader at layer l meets, for every upstream MLP module u, the sum of what u wrote before l:
E_u(l) = sum_{t<l} W_dec_u[:, t-u]. One buffer [U, D] holds all of them and moves from reader to reader by one
addition per module and layer; the backward pass walks the readers in reverse, takes the additions back, and
the gradient of every decoder slice is the suffix sum over the readers behind it. No sum is rebuilt for a
pair of layers, and nothing larger than the buffer and its gradient is alive.

The buffer is in fp32 at least, also where weights are bf16: rounded to bf16 after each of many additions and
subtractions, E would be wrong by some per cent at 26 layers. It is one buffer beside L (L + 1) / 2 decoder slices per
module, so that its 4 instead of 2 bytes are few; rebuilding it for every reader would cost no less memory, and time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt import ops, parallel
from sparseclt.model.attention import AttentionWeights, head_rows, rows_of_heads
from sparseclt.model.sites import Site
from sparseclt.ops.rows import accumulation_dtype


@dataclass(frozen=True)
class Reader:
    """A module that reads upstream latents: its place, how many modules are upstream, its connections, and those of the
    rows of all ranks in its group."""

    index: int
    site: Site
    upstream_modules: int
    connections: ops.Connections | None
    attention: AttentionWeights | None  # of an attention reader: it reads through the heads' OV circuits
    all_connections: ops.Connections | None = None
    group: parallel.Group = parallel.ALONE

    def carried(self, rows: Tensor) -> Tensor:
        """Its encoder rows [F, D] as they meet decoder rows: unchanged, or of an attention reader [H, F, D]."""
        return rows if self.attention is None else rows_of_heads(rows, self.attention)


class _RunningDecoders:
    """E [U, D] at a layer, moved up and down by additions and subtractions of decoder slices; in fp32 at least."""

    def __init__(self, sites: Sequence[Site], decoders: Sequence[Tensor], upstream_modules: int):
        self.sites, self.decoders, self.layer = sites[:upstream_modules], decoders, 0
        F, _, D = decoders[0].shape
        self.E = decoders[0].new_zeros(upstream_modules, F, D, dtype=accumulation_dtype(decoders[0].dtype))
        for u, site in enumerate(self.sites):
            if site.kind == "attn":  # writes once; whether it is upstream is a matter of the slice taken
                self.E[u] = decoders[u][:, 0]

    def slices(self, layer: int) -> Iterator[tuple[int, int]]:
        """(module, target) of every decoder slice that writes the MLP output of `layer`."""
        for u, site in enumerate(self.sites):
            if site.kind == "mlp" and 0 <= layer - site.layer < self.decoders[u].shape[1]:
                yield u, layer - site.layer

    def up_to(self, layer: int) -> None:
        while self.layer < layer:
            if written := list(self.slices(self.layer)):
                places, parts = zip(*((self.E[u], self.decoders[u][:, t]) for u, t in written), strict=True)
                torch._foreach_add_(places, parts)  # one launch on a GPU
            self.layer += 1

    def at(self, reader: Reader) -> Tensor:
        return self.E[: reader.upstream_modules].flatten(0, 1)


def effective_decoders(
    readers: Sequence[Reader], sites: Sequence[Site], decoders: Sequence[Tensor]
) -> Iterator[tuple[Reader, Tensor]]:
    """(reader, E [U, D]) for every reader with upstream modules, in model order. E is one buffer, reused; in fp32 at
    least."""
    readers = [reader for reader in readers if reader.upstream_modules]
    if not readers:
        return
    with torch.no_grad():
        running = _RunningDecoders(sites, decoders, max(reader.upstream_modules for reader in readers))
        for reader in readers:
            running.up_to(reader.site.layer)
            yield reader, running.at(reader)


def _reader_weights(reader: Reader, rows: Tensor, E: Tensor, backend: str | None) -> Tensor:
    """V [F, C] of an MLP reader, [H, F, C] of an attention reader; rows [F, D] is its (centred) encoder. In the dtype
    of `rows`, computed in that of E."""
    connections, attention = reader.connections, reader.attention
    assert connections is not None

    def read(rows: Tensor) -> Tensor:
        return parallel.virtual_weights(
            rows, E, connections, group=reader.group, all_connections=reader.all_connections, backend=backend
        )

    if attention is None:
        return read(rows.to(E.dtype)).to(rows.dtype)
    return torch.stack([read(head_rows(rows, attention, head)) for head in range(len(attention.W_V))])


class _VirtualWeights(torch.autograd.Function):
    @staticmethod
    def forward(ctx, readers, sites, backend, *tensors):
        encoders, decoders = tensors[: len(readers)], tensors[len(readers) :]
        ctx.readers, ctx.sites, ctx.backend = readers, sites, backend
        ctx.save_for_backward(*tensors)
        return tuple(
            _reader_weights(reader, rows, E, backend)
            for rows, (reader, E) in zip(encoders, effective_decoders(readers, sites, decoders), strict=True)
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        readers, tensors = ctx.readers, ctx.saved_tensors
        encoders, decoders = tensors[: len(readers)], tensors[len(readers) :]
        encoder_grads = [torch.zeros_like(rows) for rows in encoders]
        decoder_grads = [torch.zeros_like(decoder) for decoder in decoders]
        running = _RunningDecoders(ctx.sites, decoders, max(reader.upstream_modules for reader in readers))
        running.up_to(readers[-1].site.layer)
        dE = torch.zeros_like(running.E)

        def down_to(layer: int) -> None:
            while running.layer > layer:
                running.layer -= 1
                for u, target in running.slices(running.layer):
                    running.E[u] -= decoders[u][:, target]
                    decoder_grads[u][:, target] = dE[u]

        for i in reversed(range(len(readers))):
            reader = readers[i]
            down_to(reader.site.layer)
            with torch.enable_grad():
                rows = encoders[i].detach().requires_grad_()
                E = running.at(reader).detach().requires_grad_()
                V = _reader_weights(reader, rows, E, ctx.backend)
                row_grad, E_grad = torch.autograd.grad(V, (rows, E), grads[i])
            encoder_grads[i] += row_grad
            dE[: reader.upstream_modules] += E_grad.view_as(dE[: reader.upstream_modules])
        down_to(0)
        for u, site in enumerate(running.sites):
            if site.kind == "attn":
                decoder_grads[u][:, 0] = dE[u]
        return None, None, None, *encoder_grads, *decoder_grads


def cross_layer_virtual_weights(
    readers: Sequence[Reader],
    sites: Sequence[Site],
    encoders: Sequence[Tensor],
    decoders: Sequence[Tensor],
    backend: str | None = None,
) -> list[Tensor | None]:
    """Virtual weights of every reader: V [F, C] (MLP) or [H, F, C] (attention); None without upstream modules, and
    for C = 0.

    Equivalent, for an MLP reader at layer l, to `(W_enc @ E.T).gather(1, connections)` with
    `E = cat([W_dec_u[:, : l - u].sum(1) for u in upstream])`, and 0 at empty slots.

    `encoders`: per reader [F, D], centred where the model's norm centres; `decoders`: per module [F, T, D].
    """
    active = [r for r in readers if r.upstream_modules and (r.connections is None or r.connections.C)]
    result: list[Tensor | None] = [None] * len(readers)
    if active:
        rows = [encoders[reader.index] for reader in active]
        weights = _VirtualWeights.apply(active, sites, backend, *rows, *decoders)
        for reader, V in zip(active, weights, strict=True):
            result[reader.index] = V
    return result
