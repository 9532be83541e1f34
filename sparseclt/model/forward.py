"""One pass over a batch in one mode, a module at a time."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseclt import ops
from sparseclt.model.attention import attention_write
from sparseclt.model.modules import Latents
from sparseclt.model.sites import MODES, Mode, Site, model_sites, upstream_modules

if TYPE_CHECKING:
    from sparseclt.model.activations import Activations
    from sparseclt.model.clt import SparseCLT
    from sparseclt.model.decoder_gradients import DecoderGradients


class ForwardPass:
    """One mode's pass over a batch, a module at a time in model order.

    Captured activations take all steps at once (`SparseCLT.forward`); in a replaced model each step is taken
    when the model arrives there, on that run's own activations.
    """

    def __init__(
        self,
        clt: "SparseCLT",
        mode: Mode,
        backend: str | None = None,
        error_nodes: bool = False,
        gradients: "DecoderGradients | None" = None,
    ):
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        self.clt, self.mode, self.backend, self.error_nodes = clt, mode, backend, error_nodes
        self.architecture, self.gradients = clt.architecture, gradients
        self.latents: list[Latents] = []
        self._side_by_side: Latents | None = None  # [N, M K]: all modules' latents, with ids in 0..U-1
        self.virtual_weights = clt.virtual_weights(backend, gradients) if mode == "sparse" else []
        self._outputs: dict[Site, Tensor] = {}
        self._order = model_sites(self.architecture.layers, attention=True)
        self._passed = 0  # sites of `_order` whose writes are already in `_stream`
        self._stream: Tensor | None = None  # [N, D]
        self._readings: list[Tensor] = []  # [N, D] a module

    def output(self, site: Site) -> Tensor:
        """The reconstruction [N, D] of a site, complete once all modules up to it have run."""
        return self._outputs[site]

    def advance(self, site: Site, activations: "Activations") -> Tensor:
        """Run the next module on `activations` (filled at least up to `site`): its site's output [B, S, D]."""
        index = len(self.latents)
        if site != self.clt.sites[index]:
            raise ValueError(f"site: expected {self.clt.sites[index].name} next, got {site.name}")
        self.activations = activations
        self._readings.append(self._read(site))
        latents = self.encode(index)
        self.latents.append(latents)
        if self.mode == "sparse":
            self._put_beside(index, latents)
        self._write(index, latents)
        return self._outputs[site].view_as(activations.r_0)

    def decode(self, index: int, latents: Latents) -> Iterator[tuple[Site, Tensor]]:
        """What latents of module `index` write, without bias: each target with its [N, D]."""
        module = self.clt.transcoder(index)
        if self.gradients is None:
            parts = module.decode(latents, self.backend).unbind(1)
        else:
            parts = self.gradients.decode(index, latents)
        for target, written in enumerate(parts):
            yield Site(module.site.kind, module.site.layer + target), written.to(self.activations.r_0.dtype)

    def _write(self, index: int, latents: Latents) -> None:
        module = self.clt.transcoder(index)
        for to, written in self.decode(index, latents):
            self._outputs[to] = self._outputs[to] + written if to in self._outputs else written
        self._outputs[module.site] = self._outputs[module.site] + module.b_dec

    def _read(self, site: Site) -> Tensor:
        """What `site` reads unmasked, [N, D]. Vanilla: the model's own input of that site. Sparsely-connected: the
        residual stream as far as no latent stands for it: the embedding, biases already written, frozen attention
        outputs, error nodes."""
        activations, layer = self.activations, site.layer
        if self.mode == "vanilla":
            return (activations.x if site.kind == "mlp" else activations.attn_out)[layer].flatten(0, 1)
        if self._stream is None:
            self._stream = activations.r_0.flatten(0, 1)
        earlier = upstream_modules(self._order, self._order.index(site), self.architecture.parallel)
        for writer in self._order[self._passed : earlier]:
            outputs = activations.mlp_out if writer.kind == "mlp" else activations.attn_out
            real = outputs[writer.layer].flatten(0, 1)
            if writer not in self._outputs:
                self._stream = self._stream + real
                continue
            self._stream = self._stream + self.clt.transcoder(self.clt.sites.index(writer)).b_dec
            if self.error_nodes:
                self._stream = self._stream + (real - self._outputs[writer]).detach()
        self._passed = max(self._passed, earlier)
        return self._stream

    def encode(self, index: int, rows: Tensor | None = None, k: int | None = None) -> Latents:
        """The k strongest latents of module `index`, or of its latents `rows` [R] alone (ids then in 0..R-1).

        Its reading must have been taken by `advance`.
        """
        module, reading = self.clt.transcoder(index), self._readings[index]
        k = k or self.architecture.active
        W_enc: Tensor = module.W_enc if self.mode == "vanilla" else self.clt.reading_rows(index)
        b_enc: Tensor = module.b_enc
        V, connections = None, module.connections
        if self.mode == "sparse":
            V = self.virtual_weights[index]
            reading = self._connected_reading(module.site, reading, connected=V is not None)
        reading = reading.to(W_enc.dtype)
        if rows is not None:
            W_enc, b_enc = W_enc[rows], b_enc[rows]
            if V is not None:
                assert connections is not None
                V, connections = V[..., rows, :], ops.Connections(connections.indices[rows], module.upstream)
        if V is None:
            return Latents(*ops.topk_encode(reading, W_enc, b_enc, k, backend=self.backend))
        assert connections is not None
        z = self._upstream_latents(index)
        if module.site.kind == "mlp":
            scale = self.activations.scale[module.site.layer].flatten().to(V.dtype)
            return Latents(
                *ops.connected_encode(reading, W_enc, b_enc, *z, V, connections, scale, k, backend=self.backend)
            )
        by_sequence = self.activations.tokens.shape
        values, indices = ops.attention_encode(
            reading.unflatten(0, by_sequence), W_enc, b_enc,
            z.values.unflatten(0, by_sequence), z.indices.unflatten(0, by_sequence),
            V, connections, self._mix(module.site.layer).to(V.dtype), k, backend=self.backend,
        )  # fmt: skip
        return Latents(values.flatten(0, 1), indices.flatten(0, 1))

    def _connected_reading(self, site: Site, stream: Tensor, connected: bool) -> Tensor:
        """What meets the encoder rows: for attention what it writes for `stream`; for an MLP `stream` itself,
        which `connected_encode` divides by the scale, or the quotient where nothing is upstream."""
        if site.kind == "mlp":
            return stream if connected else stream / self.activations.scale[site.layer].flatten()[:, None]
        weights = self.clt.attention_of(site)
        assert weights is not None
        base = stream.unflatten(0, self.activations.tokens.shape)
        return attention_write(base, self._mix(site.layer), weights).flatten(0, 1)

    def _mix(self, layer: int) -> Tensor:
        """Frozen pattern over the key's scale: [B, H, S, S]."""
        return self.activations.attn_pattern[layer] / self.activations.attn_scale[layer][:, None, None, :]

    def _put_beside(self, index: int, latents: Latents) -> None:
        """Put the latents of module `index` beside those before it: later modules read them all."""
        N, K = latents.values.shape
        if self._side_by_side is None:
            self._side_by_side = Latents(*(tensor.new_empty(N, len(self.clt.sites) * K) for tensor in latents))
        columns = slice(index * K, (index + 1) * K)
        # By .data: autograd has saved columns to the left of these, and shall not take this for a change of them.
        self._side_by_side.values.data[:, columns] = latents.values.detach()
        self._side_by_side.indices.data[:, columns] = latents.indices + index * self.architecture.latents

    def _upstream_latents(self, index: int) -> Latents:
        """The latents of all modules before module `index`, side by side: ids in 0..U-1. Views of one buffer: copies
        for each module would grow as the square of the number of layers."""
        before = [z.values for z in self.latents[: self.clt.upstream[index]]]
        assert self._side_by_side is not None
        values, indices = (t.data[:, : len(before) * self.architecture.active] for t in self._side_by_side)
        return Latents(_SideBySide.apply(values, *before), indices)


class _SideBySide(torch.autograd.Function):
    """`torch.cat(parts, 1)`, which stands in `joined` already."""

    @staticmethod
    def forward(ctx: Any, joined: Tensor, *parts: Tensor) -> Tensor:
        ctx.parts = len(parts)
        return joined.view_as(joined)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad.chunk(ctx.parts, 1)
