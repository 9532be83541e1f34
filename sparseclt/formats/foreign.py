"""What a directory of another tool holds, in that tool's terms, and the CLT that computes the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from sparseclt.formats.lazy import ConvertedTensors, LazyTensor
from sparseclt.formats.mlp_input import has_norm_behind_mlp, unfolded_bias, unfolded_weights
from sparseclt.language_model.language_model import RESIDUAL, LanguageModel
from sparseclt.model.shape import Architecture
from sparseclt.storage.directories import CheckpointError

Targets = Literal["all", "own"]
AFTER, BEFORE = "mlp.hook_in", "ln2.hook_normalized"
INPUT_HOOKS = (AFTER, BEFORE)  # the names of `input_hook`, where the caller has to say what was meant


@dataclass(frozen=True)
class ForeignCLT:
    """A CLT, or a set of per-layer transcoders, as another tool stored it.

    `tensors`: of each layer, W_enc [F, D], b_enc [F], W_dec [F, T, D], b_dec [D] and, with activation "jumprelu",
    threshold [F], none of them negative. `active`: K, or with other activations than "topk" the mean number of active
    latents; None: not stated. `active_ratio`: as in `Architecture`. `input_hook`, `output_hook`: what encoders read and
    decoders reconstruct, as TransformerLens calls it within a block; None: not stated. `hooks_at`: the file and field
    that say so.
    """

    folder: Path
    tensors: Sequence[Mapping[str, LazyTensor]]
    activation: Literal["topk", "jumprelu", "relu"]
    targets: Targets
    output_hook: str
    input_hook: str | None
    hooks_at: str
    active: int | None = None
    active_ratio: float = 1.0
    model_name: str = ""

    @property
    def latents(self) -> int:
        """F."""
        return self.tensors[0]["b_enc"].shape[0]

    def clt(
        self, language_model: LanguageModel | None, active: int | None = None, input_hook: str | None = None
    ) -> tuple[Architecture, ConvertedTensors]:
        """The architecture and the tensors of the CLT on `language_model` that computes the same.

        Raises ValueError, naming the argument, for what is missing or does not fit; CheckpointError, naming the file,
        for what a `SparseCLT` cannot hold.
        """
        if language_model is None:
            name = self.model_name or "NAME"
            raise ValueError(
                f"language_model: expected the model that {self.folder} was trained on, whose norms its encoders meet; "
                f"give language_model=LanguageModel.load({name!r})"
            )
        self._check_fits(language_model)
        if self.input_hook == RESIDUAL:
            language_model = language_model.reading(RESIDUAL)
        after = self._reads_after_the_norm(language_model, input_hook)
        activation: Literal["topk", "jumprelu"] = "topk" if self.activation == "topk" else "jumprelu"
        if self.activation == "topk" and active is not None and active != self.active:
            raise ValueError(f"active: expected None or the {self.active} that {self.folder} says, got {active}")
        if (found := active or self.active) is None:
            raise ValueError(
                f"active: expected the mean number of active latents per token, which {self.folder} does not say; a "
                "token has room for 4 times as many. sparseclt import measures it on text"
            )
        architecture = Architecture(
            language_model.shape, self.latents, min(found, self.latents), activation=activation, targets=self.targets,
            active_ratio=self.active_ratio,
        )  # fmt: skip
        tensors: dict[str, LazyTensor] = {}
        for layer, parts in enumerate(self.tensors):
            ours = _unfolded(parts, language_model, layer) if after else dict(parts)
            if self.activation == "relu":
                ours["threshold"] = parts["b_enc"].converted(torch.zeros_like)
            tensors |= {f"mlp.{layer}.{name}": tensor for name, tensor in ours.items()}
        return architecture, ConvertedTensors(tensors)

    def _check_fits(self, language_model: LanguageModel) -> None:
        shape, first = language_model.shape, self.tensors[0]["W_enc"]
        if (found := first.shape[1]) != shape.d_model:
            raise ValueError(
                f"language_model: expected one of width {found}, as in {first.place}, got width {shape.d_model} "
                f"({shape.name})"
            )
        if (layers := len(self.tensors)) != shape.layers:
            raise ValueError(
                f"language_model: expected {layers} covered layers, as many as {self.folder} has, got {shape.layers}; "
                f"load it with layers={layers} if it has more"
            )
        for tensors in self.tensors:
            if tensors["W_enc"].shape != first.shape:
                raise CheckpointError(
                    f"{tensors['W_enc'].place} gives {tensors['W_enc'].shape[0]} latents, expected {first.shape[0]} as "
                    "in layer 0: all modules of a SparseCLT have the same number"
                )
        if self.output_hook == "mlp.hook_out" and has_norm_behind_mlp(language_model):
            raise CheckpointError(
                f"{self.hooks_at} names the output of the MLP itself, expected that of the norm behind it "
                "(hook_mlp_out), which a SparseCLT reconstructs on this model"
            )
        if self.output_hook not in ("hook_mlp_out", "mlp.hook_out"):
            raise CheckpointError(
                f"{self.hooks_at} has the output {self.output_hook!r}, expected 'hook_mlp_out': a SparseCLT "
                "reconstructs MLP outputs"
            )

    def _reads_after_the_norm(self, language_model: LanguageModel, input_hook: str | None) -> bool:
        """Whether the encoders read behind the gain and bias of the norm before the MLP."""
        if input_hook not in (None, *INPUT_HOOKS):
            raise ValueError(f"input_hook: expected one of {', '.join(INPUT_HOOKS)}, got {input_hook!r}")
        stated = self.input_hook
        normalized = stated is not None and stated in (BEFORE, language_model.shape.mlp_input) and stated != AFTER
        # TransformerLens up to 2.18 put the hook of a LayerNorm behind its gain and bias, 3.0 puts it before them; that
        # of an RMSNorm always stood before its gain.
        unclear = stated is None or normalized and language_model.shape.centred
        if stated == RESIDUAL and input_hook is None:
            return False
        if not unclear and not normalized and stated != AFTER:
            raise CheckpointError(
                f"{self.hooks_at} has the input {stated!r}, expected {AFTER!r}, {BEFORE!r} or {RESIDUAL!r}: "
                "the encoders of a SparseCLT read what the MLP reads, or the residual stream in front of its norm"
            )
        if unclear and input_hook is None:
            what = "does not say what the encoders read" if stated is None else f"has the input {stated!r}"
            raise ValueError(
                f"input_hook: {self.hooks_at} {what}; give {AFTER!r} if that is the MLP's own input, behind the gain "
                f"and bias of the norm (so up to TransformerLens 2.18), or {BEFORE!r} if it stands before them"
            )
        if not unclear and input_hook is not None and (input_hook == AFTER) != (stated == AFTER):
            raise ValueError(f"input_hook: expected None or {stated!r}, as {self.hooks_at} says, got {input_hook!r}")
        return (input_hook if unclear else stated) == AFTER


def _unfolded(parts: Mapping[str, LazyTensor], language_model: LanguageModel, layer: int) -> dict[str, LazyTensor]:
    """`parts` with the encoder that reads before the norm's gain and bias."""
    W_enc, b_enc = parts["W_enc"], parts["b_enc"]
    return dict(parts) | {
        "W_enc": W_enc.converted(partial(unfolded_weights, language_model, layer)),
        "b_enc": b_enc.converted(lambda bias: unfolded_bias(language_model, layer, W_enc.read(), bias)),
    }


def nonnegative(threshold: LazyTensor) -> LazyTensor:
    """`threshold` [F] itself. Raises CheckpointError for a negative one, or NaN: below zero a latent would put out
    negative values, which a `SparseCLT` has none of."""
    if not bool((threshold.read() >= 0).all()):
        raise CheckpointError(f"{threshold.place} is negative or NaN somewhere, expected thresholds of at least 0")
    return threshold
