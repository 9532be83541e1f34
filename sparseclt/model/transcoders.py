"""The modules of a CLT in model order: their weights, their connections, and how they read one another."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from sparseclt.model.attention import AttentionWeights, centre
from sparseclt.model.cross_layer import Reader, cross_layer_virtual_weights
from sparseclt.model.modules import Transcoder
from sparseclt.model.shape import Architecture
from sparseclt.model.sites import Site, model_sites, upstream_modules
from sparseclt.parallel.ranks import ONE_RANK, Ranks


class Transcoders(nn.Module):
    """What passes over a batch are made from; `SparseCLT` adds the passes and the files.

    `attention_weights`: the OV circuits of every layer, needed for `attention="latents"`.

    `warns_when_full`: a pass warns where a token has as many active latents as it has room for, and may lack others. Of
    a CLT that another tool trained, nothing has seen to it that there is room.

    `products`: the dtype to which passes round, in training mode, what they multiply: encoders, decoders, virtual
    weights, and what these meet (mixed precision). All sums, biases, scales, losses, and the weights themselves keep
    theirs. None: the dtype of the weights.

    `ranks`: those that the CLT is spread over, each with its part of every module (`Transcoder`). All of them call
    everything that computes together, in the same order.
    """

    warns_when_full = False
    products: torch.dtype | None = None

    def __init__(
        self,
        architecture: Architecture,
        attention_weights: Sequence[AttentionWeights] | None = None,
        *,
        ranks: Ranks = ONE_RANK,
    ):
        super().__init__()
        a = self.architecture = architecture
        self.ranks = ranks
        self.sites = model_sites(a.model.layers, a.attention == "latents")
        self.upstream = [upstream_modules(self.sites, i, a.model.parallel) for i in range(len(self.sites))]
        self.transcoders = nn.ModuleList(
            Transcoder(
                site, a.model.d_model, a.latents, self._targets(site), upstream * a.latents, a.activation, ranks.latents
            )
            for site, upstream in zip(self.sites, self.upstream, strict=True)
        )
        if a.attention == "latents":
            self._take_attention(attention_weights)

    def _take_attention(self, weights: Sequence[AttentionWeights] | None) -> None:
        layers = self.architecture.model.layers
        if weights is None or len(weights) != layers:
            raise ValueError(
                f"attention_weights: attention='latents' needs the OV circuits of all {layers} layers "
                "(LanguageModel.attention_weights)"
            )
        for module in self:
            if module.site.kind == "attn":
                for name in ("W_V", "W_O", "bias"):
                    module.register_buffer(name, getattr(weights[module.site.layer], name), persistent=False)

    def _targets(self, site: Site) -> int:
        return self.architecture.targets_of(site.layer) if site.kind == "mlp" else 1

    def transcoder(self, index: int) -> Transcoder:
        """Module `index` of the model order."""
        return cast(Transcoder, self.transcoders[index])

    def __iter__(self) -> Iterator[Transcoder]:
        return cast(Iterator[Transcoder], iter(self.transcoders))

    def rounded(self, tensor: Tensor) -> Tensor:
        """`tensor` as products read it. Differentiable."""
        return tensor if self.products is None or not self.training else tensor.to(self.products)

    def own_columns(self, vectors: Tensor) -> Tensor:
        """This rank's columns of vectors [..., D]: those of its reconstructions."""
        return self.transcoder(0).own_columns(vectors)

    @property
    def reads_upstream(self) -> bool:
        """Whether any module has upstream modules; without one there is only vanilla mode."""
        return any(module.upstream for module in self)

    @property
    def connected(self) -> bool:
        """Whether every module with upstream modules has its connections."""
        return all(module.connection_indices is not None for module in self if module.upstream)

    def connect(self, connections: Sequence[Tensor | None]) -> None:
        """Give every module its connections [F, C]; None leaves a module as it is."""
        for module, chosen in zip(self, connections, strict=True):
            if chosen is not None:
                module.connect(chosen)

    def reading_rows(self, index: int) -> Tensor:
        """Encoder rows [F, D] as they meet the residual stream, a decoder row, or (attention) its output."""
        module = self.transcoder(index)
        if module.site.kind == "mlp" and self.architecture.model.centred:
            return centre(module.W_enc)
        return module.W_enc

    def readers(self) -> list[Reader]:
        """Every module as a reader of those before it."""
        return [
            Reader(i, m.site, self.upstream[i], m.connections, self.attention_of(m.site), m.all_connections, m.group)
            for i, m in enumerate(self)
        ]

    def attention_of(self, site: Site) -> AttentionWeights | None:
        """The frozen OV circuits of an attention site; None for an MLP."""
        if site.kind == "mlp":
            return None
        module = self.transcoder(self.sites.index(site))
        W_V, W_O, bias = (module.get_buffer(name) for name in ("W_V", "W_O", "bias"))
        return AttentionWeights(W_V, W_O, bias, self.architecture.model.centred)

    def unmasked_virtual_weights(self, backend: str | None = None) -> list[Tensor | None]:
        """V of every module ([F, C]; attention [H, F, C]), learned connections taken as open; None without upstream
        or with C = 0.

        Raises ValueError if connections have not been chosen.
        """
        if not self.connected:
            raise ValueError("this CLT has no connections yet: choose them with TopConnections(...).update(clt)")
        rows = [self.reading_rows(i) for i in range(len(self.sites))]
        decoders = [module.W_dec for module in self]
        return cross_layer_virtual_weights(self.readers(), self.sites, rows, decoders, backend)

    def masked(self, weights: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Virtual weights with closed learned connections at 0, in their own dtype; the logits may be wider."""
        masks = [module.mask() for module in self]
        return [
            V if mask is None or V is None else (V * mask).to(V.dtype) for V, mask in zip(weights, masks, strict=True)
        ]

    def virtual_weights(self, backend: str | None = None) -> list[Tensor | None]:
        """V of every module ([F, C]; attention [H, F, C]), learned masks applied; None without upstream or with C = 0.

        Raises ValueError if connections have not been chosen.
        """
        return self.masked(self.unmasked_virtual_weights(backend))
