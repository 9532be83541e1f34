"""The run that a graph describes: one prompt, in one mode, with all that its graph is made from."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparseclt.language_model.language_model import LanguageModel
from sparseclt.language_model.unembedding import logit_directions, recorded_final_stream
from sparseclt.model.clt import SparseCLT
from sparseclt.model.forward import ForwardPass
from sparseclt.model.replacement import hooks
from sparseclt.model.sites import Mode, Site

LINEAR_TOLERANCE = 1e-4  # of the largest logit: far above rounding, far below a wrong formula


@dataclass(frozen=True)
class PromptRun:
    """One prompt's run: without error nodes that of the sparse model, in which the CLT stands for its sites; with them
    the language model's own, which the latents and what they leave unexplained add up to."""

    clt: SparseCLT
    language_model: LanguageModel
    forward: ForwardPass
    error_nodes: bool
    residual: Tensor  # [S, D] before the final norm
    scale: Tensor  # [S] what the final norm divides by
    logits: Tensor  # [S, V]

    @property
    def tokens(self) -> Tensor:
        """The prompt's tokens [S]."""
        return self.forward.activations.tokens[0]

    @property
    def covers_all_layers(self) -> bool:
        """Whether the logits are read right behind the covered layers."""
        return bool(self.clt.architecture.model.layers == self.language_model.bridge.cfg.n_layers)

    def counted(self) -> Tensor:
        """Whether each token has latents, [S]; a token that has none keeps the model's own outputs."""
        counted = self.forward.activations.counted
        return torch.ones_like(self.tokens, dtype=torch.bool) if counted is None else counted[0]

    def given(self) -> dict[Site, Tensor]:
        """What each site writes into the stream that neither a latent nor a bias stands for, [S, D] in float64.

        Of a site without a module (frozen attention) all of it; of a module its error, where errors are nodes, and on
        tokens that do not count the model's own output.
        """
        counted, activations = self.counted()[:, None], self.forward.activations
        written = self._written_by_latents()
        rest: dict[Site, Tensor] = {}
        for layer in range(self.clt.architecture.model.layers):
            for site in (Site("attn", layer), Site("mlp", layer)):
                rest[site] = activations.output(site).double()
                if site not in written:
                    continue
                error = rest[site] - written[site] - self.clt.transcoder(self.clt.sites.index(site)).b_dec.double()
                rest[site] = torch.where(counted, error if self.error_nodes else 0.0, rest[site])
        return rest

    def beyond(self) -> Tensor:
        """What layers behind the covered ones write, [S, D] in float64."""
        layers = self.clt.architecture.model.layers
        return self.residual.double() - self.forward.activations.residual(layers)[0].double()

    def _written_by_latents(self) -> dict[Site, Tensor]:
        written: dict[Site, Tensor] = {}
        for index, latents in enumerate(self.forward.latents):
            for site, part in self.forward.decode(index, latents):
                written[site] = written[site] + part.double() if site in written else part.double()
        return written


def check_exact(clt: SparseCLT, language_model: LanguageModel, mode: Mode = "sparse") -> None:
    """Raises ValueError for sparsely-connected mode of a CLT that has none, and for half precision, in which nothing
    would add up."""
    dtypes = {"clt": next(clt.parameters()).dtype, "language_model": language_model.dtype}
    for name, dtype in dtypes.items():
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}: expected float32 or float64, in which a graph is exact, got {dtype}; call .float()"
            )
    if mode == "sparse" and not (clt.connected and clt.reads_upstream):
        raise ValueError(
            "clt: expected a CLT with connections, whose sparsely-connected mode a graph describes, got one without; "
            "train with connections.policy 'top', choose connections with TopConnections(...).update(clt), or trace "
            "mode 'vanilla'"
        )


@torch.no_grad()
def sparse_model_run(
    clt: SparseCLT, language_model: LanguageModel, tokens: Tensor, forward: ForwardPass | None = None
) -> PromptRun:
    """The run of the sparse model on `tokens` [1, S]: the CLT in sparsely-connected mode in place of its sites.

    `forward`: the pass to make, if it is not the plain one (one with interventions, or in vanilla mode).
    """
    if forward is None:
        forward = ForwardPass(clt, "sparse")
    with recorded_final_stream(language_model) as final:
        logits = language_model.replaced_logits(tokens, **hooks(forward))
    return PromptRun(clt, language_model, forward, False, final.residual[0], final.scale[0], logits[0])


@torch.no_grad()
def language_model_run(
    clt: SparseCLT, language_model: LanguageModel, tokens: Tensor, mode: Mode = "sparse"
) -> PromptRun:
    """The language model's own run on `tokens` [1, S], with the latents of `mode` and their errors."""
    captured = {}

    def keep_mlp(layer, live):
        captured["live"] = live
        return live.mlp_out[-1]

    attention = {"on_attn": lambda layer, live: live.attn_out[-1]} if clt.architecture.attention == "latents" else {}
    with recorded_final_stream(language_model) as final:
        logits = language_model.replaced_logits(tokens, on_mlp=keep_mlp, **attention)
    forward = clt(captured["live"], mode, error_nodes=mode == "sparse")
    return PromptRun(clt, language_model, forward, True, final.residual[0], final.scale[0], logits[0])


def linear_logits(run: PromptRun, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Directions [k, D], over the frozen scale of the final norm, and offsets [k] of the last token's logits `chosen`
    [k], minus their mean over the vocabulary; in float64.

    Raises ValueError for a model whose logits are not linear in the stream given that scale (with a soft cap, say).
    """
    directions, offsets = logit_directions(run.language_model, chosen)
    directions = directions / run.scale[-1].double()
    logits = run.logits[-1].double()
    expected = logits[chosen] - logits.mean()
    error = (run.residual[-1].double() @ directions.T + offsets - expected).abs().max()
    if error > LINEAR_TOLERANCE * logits.abs().max():
        raise ValueError(
            "model.path: expected logits that are linear in the residual stream given the final norm's scale, which "
            f"{run.language_model.shape.name or 'this model'} does not have (a soft cap on logits, for example)"
        )
    return directions, offsets
