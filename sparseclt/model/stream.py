"""The part of the residual stream that a reader takes as it is, because no latent stands for it."""

from collections.abc import Mapping

from torch import Tensor

from sparseclt.model.activations import Activations, at_least_float32
from sparseclt.model.sites import Site, model_sites, upstream_modules
from sparseclt.model.transcoders import Transcoders
from sparseclt.parallel import gather_columns


class UnmaskedStream:
    """In sparsely-connected mode: the embedding, biases already written, frozen attention outputs, error nodes; at
    tokens that do not count, which have no latents, the model's own residual stream. With `all_open`, also all that
    upstream latents have written.

    Sites ask in model order; the sum grows from one to the next and is never built anew.
    """

    def __init__(self, clt: Transcoders, error_nodes: bool, all_open: bool = False):
        self.clt, self.error_nodes, self.all_open = clt, error_nodes, all_open
        self._order = model_sites(clt.architecture.model.layers, attention=True)
        self._passed = 0  # sites of `_order` whose writes are already in `_stream`
        self._stream: Tensor | None = None  # [N, D]

    def before(self, site: Site, activations: Activations, outputs: Mapping[Site, Tensor]) -> Tensor:
        """What `site` reads, [N, D]. `outputs`: the reconstructions [N, D] of earlier modules, this rank's columns."""
        if self._stream is None:
            self._stream = at_least_float32(activations.r_0.flatten(0, 1))
        earlier = upstream_modules(self._order, self._order.index(site), self.clt.architecture.model.parallel)
        for writer in self._order[self._passed : earlier]:
            real = activations.output(writer)
            if writer not in outputs:
                self._stream = self._stream + real
                continue
            reconstruction = outputs[writer]
            if self.all_open or self.error_nodes:
                reconstruction = gather_columns(reconstruction, self.clt.ranks.latents)
            if self.all_open:
                written = reconstruction
            else:
                b_dec = self.clt.transcoder(self.clt.sites.index(writer)).b_dec
                written = activations.where_counted(b_dec, real)
            self._stream = self._stream + written
            if self.error_nodes:
                self._stream = self._stream + (real - reconstruction).detach()
        self._passed = max(self._passed, earlier)
        return self._stream
