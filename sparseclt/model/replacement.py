"""A language model's run with the CLT in place of its MLPs."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from sparseclt.model.activations import Activations
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.forward import ForwardPass
from sparseclt.model.sites import Kind, Mode, Site
from sparseclt.model.transcoders import Transcoders


def replacement(
    clt: Transcoders, mode: Mode, backend: str | None = None, *, gradients: DecoderGradients | None = None
) -> dict[str, Callable[..., Tensor]]:
    """Hooks for `LanguageModel.replaced_logits` and `cross_entropy`: every module's site gets its reconstruction.

    The modules read the replaced run itself, layer by layer; nothing of the real run is left, except that position 0
    of every row keeps the model's own outputs. In sparsely-connected mode the frozen parts (norm scales, attention) are
    that run's own.
    """
    return hooks(ForwardPass(clt, mode, backend, gradients=gradients))


def hooks(forward: ForwardPass) -> dict[str, Callable[..., Tensor]]:
    """The same for a pass that has not begun: the running model advances it."""

    def advance(kind: Kind, layer: int, live: Activations) -> Tensor:
        site = Site(kind, layer)
        forward.advance(site, live)
        return forward.written(site)

    named: dict[str, Callable[..., Tensor]] = {"on_mlp": partial(advance, "mlp")}
    if forward.clt.architecture.attention == "latents":
        named["on_attn"] = partial(advance, "attn")
    return named
