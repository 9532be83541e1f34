"""From TopK and BatchTopK to one threshold per latent, for tools that know neither."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparseclt.evaluation.metrics import captures
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT, in_evaluation_mode

TILE_BYTES = 64 << 20  # pre-activations that are alive at a time

ROOM = 16  # times K: other tools know no limit to the active latents of a token, and some tokens have many
MARGIN = 1e-5  # by which a threshold stays below the last value that fires, as a share of it: far above rounding


def with_thresholds(clt: SparseCLT, language_model: LanguageModel, rows: Tensor) -> SparseCLT:
    """A JumpReLU CLT with the weights of `clt`: TopK is calibrated on `rows` [R, S], BatchTopK keeps the thresholds of
    vanilla mode, in either mode. A token has room for ROOM times K latents."""
    a = clt.architecture
    if a.activation == "topk":
        return calibrate(clt, language_model, rows)
    thresholds = {f"transcoders.{i}.threshold": module.threshold_of("vanilla") for i, module in enumerate(clt)}
    return _jump_relu(clt, thresholds)


@in_evaluation_mode
@torch.no_grad()
def calibrate(clt: SparseCLT, language_model: LanguageModel, rows: Tensor, *, batch_rows: int = 16) -> SparseCLT:
    """A JumpReLU CLT with the weights of `clt`, a TopK one, in which each latent fires about as often in vanilla mode.

    A latent's threshold lies halfway between the n-th and the next largest of its pre-activations on `rows` [R, S],
    where TopK keeps n of them, and is never negative; a latent that TopK never keeps never fires there. Holds the MLP
    inputs of all layers on `rows` in memory. Raises ValueError for another activation or for attention latents.
    """
    a = clt.architecture
    if a.activation != "topk" or a.attention != "frozen":
        found = f"{a.activation!r} and {a.attention!r}"
        raise ValueError(f"clt: expected activation 'topk' and attention 'frozen' to calibrate, got {found}")
    inputs: list[list[Tensor]] = [[] for _ in clt]
    fired = [torch.zeros(a.latents, dtype=torch.int64, device=module.W_enc.device) for module in clt]
    for _, activations in captures(clt, language_model, rows, batch_rows):
        forward = clt(activations, "vanilla")
        for kept, count, latents, x in zip(inputs, fired, forward.latents, activations.x, strict=True):
            counted = activations.counted_flat
            kept.append(x.flatten(0, 1) if counted is None else x.flatten(0, 1)[counted])
            count += torch.bincount(latents.indices[latents.values > 0], minlength=a.latents)
    thresholds = {}
    for i, module in enumerate(clt):
        x = torch.cat(inputs[i]).to(module.W_enc.dtype)
        thresholds[f"transcoders.{i}.threshold"] = _thresholds(x, module.W_enc, module.b_enc, fired[i])
    return _jump_relu(clt, thresholds)


def _jump_relu(clt: SparseCLT, thresholds: Mapping[str, Tensor]) -> SparseCLT:
    """`clt` with `thresholds`, by the names of its parameters."""
    kept = {name: tensor for name, tensor in clt.state_dict().items() if "threshold" not in name}
    jump = SparseCLT(replace(clt.architecture, activation="jumprelu", room=ROOM)).to(
        device=clt.transcoder(0).W_enc.device
    )
    jump.to(dtype=clt.transcoder(0).W_enc.dtype).load_state_dict({**kept, **thresholds})
    return jump.eval()


def _thresholds(x: Tensor, W_enc: Tensor, b_enc: Tensor, fired: Tensor) -> Tensor:
    """Thresholds [F] above which latents fire on `fired` [F] of the inputs x [N, D], a tile of latents at a time."""
    width = max(1, TILE_BYTES // (2 * len(x) * x.element_size()))
    parts = []
    for tile in torch.arange(len(W_enc), device=x.device).split(width):
        ranked = (x @ W_enc[tile].T + b_enc[tile]).sort(0, descending=True).values  # [N, tile]
        count = fired[tile]
        last = ranked.gather(0, (count - 1).clamp_min(0)[None])[0]
        following = ranked.gather(0, count.clamp_max(len(x) - 1)[None])[0]
        lowest = torch.where(count == len(x), torch.zeros_like(last), (last + following) / 2)
        lowest = torch.minimum(lowest, last * (1 - MARGIN))  # equal ones all fire
        parts.append(torch.where(count == 0, ranked[0].abs() * 2 + 1, lowest.clamp_min(0)))
    return torch.cat(parts)
