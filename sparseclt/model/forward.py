"""One pass over a batch in one mode, a module at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparseclt import ops, parallel
from sparseclt.model import nonlinearity
from sparseclt.model.activations import Activations
from sparseclt.model.attention import attention_write
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.modules import Latents
from sparseclt.model.over_ranks import counted_by_all
from sparseclt.model.sites import MODES, Mode, Open, Site
from sparseclt.model.stream import UnmaskedStream
from sparseclt.model.transcoders import Transcoders
from sparseclt.model.upstream import UpstreamLatents


class ForwardPass:
    """One mode's pass over a batch, a module at a time in model order.

    With captured activations all steps are taken at once (`SparseCLT.forward`); in a replaced model each step is taken
    when the model arrives there, on that run's own activations.
    """

    def __init__(
        self,
        clt: Transcoders,
        mode: Mode,
        backend: str | None = None,
        error_nodes: bool = False,
        gradients: DecoderGradients | None = None,
        open_connections: Open = "own",
    ):
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        if mode == "vanilla" and open_connections != "own":
            raise ValueError(f"open_connections: expected 'own' in vanilla mode, got {open_connections!r}")
        self.clt, self.mode, self.backend, self.gradients = clt, mode, backend, gradients
        self.latents: list[Latents] = []
        self.l0: list[Tensor] = []  # [N] per module, with JumpReLU's gradient; empty with other activations
        self.virtual_weights: list[Tensor | None] = []
        if mode == "sparse" and open_connections != "own":
            # All open: latents read the stream itself, with what upstream latents wrote, instead of F x U weights.
            self.virtual_weights = [None] * len(clt.sites)
        elif mode == "sparse":
            self.virtual_weights = clt.virtual_weights(backend) if gradients is None else gradients.virtual_weights()
        self._stream = UnmaskedStream(clt, error_nodes, all_open=open_connections == "all")
        self._upstream = UpstreamLatents(clt.architecture, clt.sites)
        self._outputs: dict[Site, Tensor] = {}
        self._readings: list[Tensor] = []  # [N, D] per module
        self._batch_tokens: int | None = None

    def output(self, site: Site) -> Tensor:
        """The reconstruction [N, D] of a site, complete once all modules up to it have run; the model's own output at
        tokens that do not count (`Activations.counted`). Of a CLT that is spread over ranks: this rank's columns."""
        return self._outputs[site]

    def written(self, site: Site) -> Tensor:
        """The same as the model's output: all columns, [B, S, D], in the dtype of the model."""
        whole = parallel.gather_columns(self._outputs[site], self.clt.ranks.latents)
        return whole.view_as(self.activations.r_0).to(self.activations.r_0.dtype)

    def advance(self, site: Site, activations: Activations) -> None:
        """Run the next module on `activations` (filled at least up to `site`)."""
        index = len(self.latents)
        if site != self.clt.sites[index]:
            raise ValueError(f"site: expected {self.clt.sites[index].name} next, got {site.name}")
        expected = self.clt.architecture.model.mlp_input
        if activations.mlp_input not in (None, expected):
            raise ValueError(
                f"activations: expected those of {expected}, which this CLT reads, got {activations.mlp_input}; take "
                f"language_model.reading({expected!r})"
            )
        self.activations = activations
        self._readings.append(self._read(site))
        latents = self.encode(index)
        latents = latents._replace(values=activations.where_counted(latents.values, 0.0))
        self.latents.append(latents)
        read = latents._replace(values=self.clt.rounded(latents.values))
        if self.mode == "sparse":
            self._upstream.add(read)
        self._write(index, read)

    def decode(self, index: int, latents: Latents) -> Iterator[tuple[Site, Tensor]]:
        """What latents of module `index` write, without bias: each target with its [N, D], or this rank's columns."""
        module = self.clt.transcoder(index)
        if self.gradients is None:
            W_dec = self.clt.rounded(module.W_dec)
            values = latents.values.to(W_dec.dtype)
            parts = ops.sparse_decode(values, latents.indices, W_dec, backend=self.backend).unbind(1)
        else:
            parts = self.gradients.decode(index, latents)
        for target, written in enumerate(parts):
            at = Site(module.site.kind, module.site.layer + target)
            yield at, written.to(torch.promote_types(self.activations.r_0.dtype, torch.float32))

    def _write(self, index: int, latents: Latents) -> None:
        module = self.clt.transcoder(index)
        for to, written in self.decode(index, latents):
            self._outputs[to] = self._outputs[to] + written if to in self._outputs else written
        complete = self._outputs[module.site] + module.own_columns(module.b_dec)
        real = module.own_columns(self.activations.output(module.site))
        self._outputs[module.site] = self.activations.where_counted(complete, real)

    def _read(self, site: Site) -> Tensor:
        """What `site` reads without a mask, [N, D]. Vanilla mode: the model's own input of that site."""
        if self.mode == "sparse":
            return self._stream.before(site, self.activations, self._outputs)
        return self.activations.input(site)

    def encode(self, index: int) -> Latents:
        """The active latents of module `index`, whose reading must have been taken by `advance`."""
        a = self.clt.architecture
        latents = self._active(index, self._candidates(index))
        if self.clt.warns_when_full and a.activation != "topk" and latents.values.shape[1] < a.latents:
            nonlinearity.warn_if_full(latents, a.active, self.clt.sites[index])
        return latents

    def _candidates(self, index: int) -> Latents:
        """Those latents of module `index` that the activation function chooses from."""
        a, module = self.clt.architecture, self.clt.transcoder(index)
        slots = a.slots_of(module.site.layer)
        if a.activation == "topk" or a.activation == "batchtopk" and self.clt.training:
            return self._strongest(index, slots)
        bandwidth = a.bandwidth if a.activation == "jumprelu" else 0.0
        floor, lowered = nonlinearity.floor(module.threshold_of(self.mode), bandwidth, module.b_enc)
        b_enc = lowered + (module.b_enc - module.b_enc.detach())  # of its value, with the gradient of the bias
        floor = parallel.all_rows(floor, module.group)
        return nonlinearity.above_floor(self._strongest(index, slots, b_enc=b_enc), floor)

    def _active(self, index: int, candidates: Latents) -> Latents:
        """Those of the strongest latents of module `index` that the activation function keeps."""
        a, module = self.clt.architecture, self.clt.transcoder(index)
        if a.activation == "topk":
            return candidates
        if a.activation == "batchtopk" and self.clt.training:
            # Emptied first: tokens that do not count take no part in the selection.
            values = self.activations.where_counted(candidates.values, 0.0)
            active, data = a.active_of(module.site.layer), self.clt.ranks.data
            return nonlinearity.batch_top_k(candidates._replace(values=values), active, self._tokens_of_batch(), data)
        threshold = parallel.all_rows(module.threshold_of(self.mode), module.group)
        if a.activation == "batchtopk":
            return nonlinearity.above(candidates, threshold)
        latents, l0 = nonlinearity.jump_relu(candidates, threshold, a.bandwidth)
        self.l0.append(self.activations.where_counted(l0[:, None], 0.0)[:, 0])
        return latents

    def _tokens_of_batch(self) -> int:
        """How many tokens count on all ranks that share a batch."""
        if self._batch_tokens is None:
            self._batch_tokens = counted_by_all(self.activations, self.clt.ranks.data)
        return self._batch_tokens

    def _strongest(self, index: int, k: int, b_enc: Tensor | None = None) -> Latents:
        """The k strongest latents of module `index`; with other biases `b_enc` [F] than its own, if they are given."""
        module, reading = self.clt.transcoder(index), self._readings[index]
        W_enc = self.clt.rounded(module.W_enc if self.mode == "vanilla" else self.clt.reading_rows(index))
        b_enc = module.b_enc if b_enc is None else b_enc
        V, connections = None, module.connections
        if self.mode == "sparse":
            V = self.virtual_weights[index]
            reading = self._connected_reading(module.site, reading, connected=V is not None)
        reading = reading.to(W_enc.dtype)
        if V is None:
            found = parallel.topk_encode(reading, W_enc, b_enc, k, group=module.group, backend=self.backend)
        else:
            assert connections is not None
            found = self._connected_encode(index, reading, W_enc, b_enc, self.clt.rounded(V), connections, k)
        return Latents(found[0].to(b_enc.dtype), found[1])  # thresholds and losses meet values as wide as biases

    def _connected_encode(
        self,
        index: int,
        reading: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        V: Tensor,
        connections: ops.Connections,
        k: int,
    ) -> Latents:
        site, z = self.clt.sites[index], self._upstream.of_first(self.clt.upstream[index])
        rows, group = len(W_enc), self.clt.ranks.latents
        own = min(k, rows)
        if site.kind == "mlp":
            scale = self.activations.scale[site.layer].flatten().to(b_enc.dtype)
            found = ops.connected_encode(reading, W_enc, b_enc, *z, V, connections, scale, own, backend=self.backend)
            return Latents(*parallel.strongest(*found, k, rows, group))
        by_sequence = self.activations.tokens.shape
        values, indices = ops.attention_encode(
            reading.unflatten(0, by_sequence), W_enc, b_enc,
            z.values.unflatten(0, by_sequence), z.indices.unflatten(0, by_sequence),
            V, connections, self.activations.mix(site.layer).to(V.dtype), own, backend=self.backend,
        )  # fmt: skip
        return Latents(*parallel.strongest(values.flatten(0, 1), indices.flatten(0, 1), k, rows, group))

    def _connected_reading(self, site: Site, stream: Tensor, connected: bool) -> Tensor:
        """What meets the encoder rows: for attention what it writes for `stream`; for an MLP `stream` itself,
        which `connected_encode` divides by the scale, or the quotient where nothing is upstream."""
        if site.kind == "mlp":
            return stream if connected else stream / self.activations.scale[site.layer].flatten()[:, None]
        weights = self.clt.attention_of(site)
        assert weights is not None
        base = stream.unflatten(0, self.activations.tokens.shape)
        post_scale = self.activations.attn_post_scale[site.layer] if self.activations.attn_post_scale else None
        return attention_write(base, self.activations.mix(site.layer), weights, post_scale).flatten(0, 1)
