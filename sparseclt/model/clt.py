"""SparseCLT: a cross-layer transcoder that runs in vanilla and in sparsely-connected mode."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sparseclt.model.attention import AttentionWeights, centre
from sparseclt.model.cross_layer import Reader, cross_layer_virtual_weights
from sparseclt.model.forward import ForwardPass
from sparseclt.model.modules import Transcoder
from sparseclt.model.sites import Mode, Site, model_sites, upstream_modules

if TYPE_CHECKING:
    from sparseclt.model.activations import Activations
    from sparseclt.model.decoder_gradients import DecoderGradients


@dataclass(frozen=True)
class Architecture:
    """The shape of a CLT, and what it must know of the model whose MLPs it replaces."""

    layers: int
    d_model: int
    latents: int
    active: int
    attention: Literal["frozen", "latents"] = "frozen"
    parallel: bool = False
    centred: bool = True
    model_name: str = ""

    def __post_init__(self):
        for name in ("layers", "d_model", "latents", "active"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.active > self.latents:
            raise ValueError(f"active: expected at most latents = {self.latents}, got {self.active}")
        if self.attention not in ("frozen", "latents"):
            raise ValueError(f"attention: expected 'frozen' or 'latents', got {self.attention!r}")


class SparseCLT(nn.Module):
    """A sparsely-connected cross-layer transcoder.

    Vanilla mode: every encoder reads the model's own residual stream. Sparsely-connected mode: each latent is
    computed from the embedding, the frozen attention outputs (`attention="frozen"`) or attention latents
    (`attention="latents"`), and at most C upstream latents through virtual weights. Source of the method:
    Jacob Drori, "Sparsely-connected Cross-layer Transcoders" (2025).

    `attention_weights`: the OV circuits of every layer, needed for `attention="latents"`.
    """

    def __init__(self, architecture: Architecture, attention_weights: list[AttentionWeights] | None = None):
        super().__init__()
        a = self.architecture = architecture
        self.sites = model_sites(a.layers, a.attention == "latents")
        self.upstream = [upstream_modules(self.sites, i, a.parallel) for i in range(len(self.sites))]
        self.transcoders = nn.ModuleList(
            Transcoder(site, a.d_model, a.latents, self._targets(site), upstream * a.latents)
            for site, upstream in zip(self.sites, self.upstream, strict=True)
        )
        if a.attention == "frozen":
            return
        if attention_weights is None or len(attention_weights) != a.layers:
            raise ValueError(
                f"attention_weights: attention='latents' needs the OV circuits of all {a.layers} layers "
                "(LanguageModel.attention_weights)"
            )
        for module in self:
            if module.site.kind == "attn":
                for name in ("W_V", "W_O", "bias"):
                    value = getattr(attention_weights[module.site.layer], name)
                    module.register_buffer(name, value, persistent=False)

    def _targets(self, site: Site) -> int:
        return self.architecture.layers - site.layer if site.kind == "mlp" else 1

    def transcoder(self, index: int) -> Transcoder:
        module = self.transcoders[index]
        assert isinstance(module, Transcoder)
        return module

    def __iter__(self):
        return iter(self.transcoders)

    @property
    def connected(self) -> bool:
        """Whether every module with upstream modules has its connections."""
        return all(m.connections is not None for m in self if m.upstream)

    def connect(self, connections: Sequence[Tensor | None]) -> None:
        """Give every module its connections [F, C]; None leaves a module as it is."""
        for module, chosen in zip(self, connections, strict=True):
            if chosen is not None:
                module.connect(chosen)

    def reading_rows(self, index: int) -> Tensor:
        """Encoder rows [F, D] as they meet the residual stream, a decoder row, or (attention) its output."""
        module = self.transcoder(index)
        if module.site.kind == "mlp" and self.architecture.centred:
            return centre(module.W_enc)
        return module.W_enc

    def readers(self) -> list[Reader]:
        return [
            Reader(i, m.site, self.upstream[i], m.connections, self.attention_of(m.site)) for i, m in enumerate(self)
        ]

    def attention_of(self, site: Site) -> AttentionWeights | None:
        """The frozen OV circuits of an attention site; None for an MLP."""
        if site.kind == "mlp":
            return None
        module = self.transcoder(self.sites.index(site))
        W_V, W_O, bias = (module.get_buffer(name) for name in ("W_V", "W_O", "bias"))
        return AttentionWeights(W_V, W_O, bias, self.architecture.centred)

    def virtual_weights(
        self, backend: str | None = None, gradients: "DecoderGradients | None" = None
    ) -> list[Tensor | None]:
        """V of every module ([F, C]; attention [H, F, C]), learned masks applied; None without upstream.

        `gradients`: what takes down their gradient instead of passing it on to encoders and decoders.
        """
        if not self.connected:
            raise ValueError("this CLT has no connections yet: choose them with TopConnections(...).update(clt)")
        rows = [self.reading_rows(i) for i in range(len(self.sites))]
        decoders = [m.W_dec for m in self]
        with torch.set_grad_enabled(torch.is_grad_enabled() and gradients is None):
            weights = cross_layer_virtual_weights(self.readers(), self.sites, rows, decoders, backend)
        if gradients is not None:
            weights = [V if V is None else gradients.virtual_weights(i, V) for i, V in enumerate(weights)]
        masks = [m.mask() for m in self]
        return [V if mask is None or V is None else V * mask for V, mask in zip(weights, masks, strict=True)]

    def forward(
        self,
        activations: "Activations",
        mode: Mode,
        *,
        backend: str | None = None,
        error_nodes: bool = False,
        gradients: "DecoderGradients | None" = None,
    ) -> ForwardPass:
        """All modules on one batch of captured activations, in `mode` "vanilla" or "sparse".

        The pass holds `latents` (one a module, in model order) and `output(site)`, the reconstruction [N, D].
        `error_nodes` (sparsely-connected mode): what each module failed to reconstruct is added to the stream
        that later modules read, as in circuit tracing. With all connections open, both modes then agree.
        `gradients`: what gathers the decoders' gradient in the backward pass, in place of their `.grad`.
        """
        forward = ForwardPass(self, mode, backend, error_nodes, gradients)
        for site in self.sites:
            forward.advance(site, activations)
        return forward

    def save_pretrained(self, path: str | Path) -> Path:
        """Write the CLT to directory `path` (circuit-tracer layout and sidecars), whole or not at all."""
        from sparseclt.model.pretrained import save_pretrained

        return save_pretrained(self, Path(path))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "SparseCLT":
        """Read what `save_pretrained` or a training run wrote; every file is checked against its digest."""
        from sparseclt.model.pretrained import from_pretrained

        return from_pretrained(Path(path))

    def describe(self) -> dict[str, Any]:
        return asdict(self.architecture)
