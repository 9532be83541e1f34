"""The language model under the CLT: captured activations, attention's weights, runs with replaced outputs.

Weights are those of the Hugging Face model, unprocessed: nothing is folded or centred.
"""

from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.devices import usable
from sparseclt.language_model.dtypes import close, keep_dtype
from sparseclt.language_model.files import DTYPES, EXPECTED, DType, load_hf, locate
from sparseclt.language_model.hooks import BlockNorms, Hook, Replace, StopRun, patterns_in_time, recording_hooks
from sparseclt.language_model.identity import tensors_digest
from sparseclt.model.activations import Activations, at_least_float32, of_whole_rows
from sparseclt.model.attention import AttentionWeights, attention_write, centre
from sparseclt.model.shape import ModelShape

PROBE_TOKENS = 8
RESIDUAL = "hook_resid_mid"


class LanguageModel:
    """A causal language model with its tokenizer, frozen and in evaluation mode."""

    def __init__(self, bridge: Any, tokenizer: Any, *, layers: int | None = None, name: str = ""):
        """Wrap a `TransformerBridge`; use `load` or `from_hf`.

        Raises ValueError if the model has fewer layers than `layers`, or is not one whose MLPs read, through
        a norm or as it is, the sum of the embedding and all earlier attention and MLP outputs.
        """
        cfg = bridge.cfg
        if layers is not None and not 1 <= layers <= cfg.n_layers:
            raise ValueError(f"layers: expected 1 to {cfg.n_layers} (the model's layers), got {layers}")
        self.dtype = next(bridge.original_model.parameters()).dtype
        if self.dtype not in (torch.float64, *DTYPES.values()):
            raise ValueError(f"hf_model: expected float32, bfloat16, float16 or float64 weights, got {self.dtype}")
        bridge.eval().requires_grad_(False)
        self.bridge, self.tokenizer = bridge, tokenizer
        self._digest: tuple[list[tuple[int, int]], str] | None = None
        self._class_name = type(bridge.original_model).__name__
        self._norms = BlockNorms.of(bridge, parallel=bool(cfg.parallel_attn_mlp))
        self.shape = ModelShape(
            layers=layers or cfg.n_layers,
            d_model=cfg.d_model,
            heads=cfg.n_heads,
            parameters=sum(parameter.numel() for parameter in bridge.original_model.parameters()),
            parallel=bool(cfg.parallel_attn_mlp),
            centred=not cfg.uses_rms_norm,
            mlp_input=self._norms.mlp_input,
            context=cfg.n_ctx,
            vocab=cfg.d_vocab,
            name=name,
        )
        keep_dtype(bridge, self.dtype)
        self._check_hooks()
        self._check_residual()

    @classmethod
    def load(
        cls,
        name_or_path: str | Path,
        *,
        layers: int | None = None,
        device: str | torch.device = "cpu",
        dtype: DType = "fp32",
    ) -> "LanguageModel":
        """Load "embedded" (the shipped model), a local directory or .gguf file, or a hub name.

        `layers`: how many layers, from the first, the CLT covers (all of them if None). `dtype`: "fp32", "bf16" or
        "fp16", whatever the files hold. Raises ValueError for a path that does not exist, a directory without a model,
        and a name that cannot be fetched.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        path = locate(name_or_path)
        if path is None:
            return cls._from_hub(str(name_or_path), layers, device, DTYPES[dtype])
        hf_model, tokenizer = load_hf(path, DTYPES[dtype])
        return cls.from_hf(hf_model.to(device), tokenizer, layers=layers, name=str(name_or_path))

    @classmethod
    def of(cls, config: TrainConfig) -> "LanguageModel":
        """The model that `config` names, in its dtype and on its device."""
        m = config.model
        return cls.load(m.path, layers=m.layers, device=usable(config.device), dtype=m.dtype)

    @classmethod
    def _from_hub(
        cls, name: str, layers: int | None, device: str | torch.device, dtype: torch.dtype
    ) -> "LanguageModel":
        from transformer_lens.model_bridge import TransformerBridge

        try:
            bridge = TransformerBridge.boot_transformers(name, device=device, dtype=dtype)
        except OSError as error:
            raise ValueError(
                f"model.path: expected {EXPECTED}, got {name!r}, which is no local path and could not be "
                f"fetched: {error}"
            ) from error
        return cls(bridge, bridge.tokenizer, layers=layers, name=name)

    @classmethod
    def from_hf(cls, hf_model: Any, tokenizer: Any, *, layers: int | None = None, name: str = "") -> "LanguageModel":
        """Wrap a Hugging Face causal language model already built; it is frozen and hooked in place."""
        from transformer_lens.model_bridge.sources import build_bridge_from_module

        hf_model.set_attn_implementation("eager")  # the others never form the attention pattern
        # Without the tokenizer, which a bridge would fetch anew under the model's name.
        bridge = build_bridge_from_module(hf_model, type(hf_model).__name__, hf_config=hf_model.config)
        return cls(bridge, tokenizer, layers=layers, name=name)

    def reading(self, hook: str) -> "LanguageModel":
        """The same model for a CLT that reads `hook`: `shape.mlp_input`, or "hook_resid_mid", the residual stream in
        front of the norm. Raises ValueError for another hook, or if the model has no such hook."""
        if hook == self.shape.mlp_input:
            return self
        if hook != RESIDUAL or f"blocks.0.{hook}" not in self.bridge.hook_dict:
            raise ValueError(f"hook: expected {self.shape.mlp_input!r} on {self._class_name}, got {hook!r}")
        other = copy(self)
        other._norms = replace(self._norms, before_mlp=None, reads=hook)
        other.shape = replace(self.shape, centred=False, mlp_input=hook)
        other._check_residual()
        return other

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.bridge.original_model.parameters()).device

    def digest(self) -> str:
        """blake2b, in hex, of the weights; computed once, and again after they were changed in place."""
        parameters = list(self.bridge.original_model.parameters())
        versions = [(parameter.data_ptr(), parameter._version) for parameter in parameters]
        if self._digest is None or self._digest[0] != versions:
            self._digest = versions, tensors_digest(parameters)
        return self._digest[1]

    @torch.no_grad()
    def capture(self, tokens: Tensor, *, attention: bool = False) -> Activations:
        """The activations of one real run on tokens [B, S], which ends behind the last covered layer."""

        def stop(value: Tensor, hook: Any) -> None:
            raise StopRun

        tokens = self._checked(tokens)
        live = self._live(tokens)
        hooks = self._hooks(live, attention)
        try:
            self._run(tokens, [*hooks, (f"blocks.{self.shape.layers - 1}.hook_resid_post", stop)])
        except StopRun:
            pass
        return live

    def replaced_logits(
        self, tokens: Tensor, *, on_mlp: Replace | None = None, on_attn: Replace | None = None
    ) -> Tensor:
        """Logits [B, S, V] of a run in which each covered layer's MLP (attention) output is what
        `on_mlp(layer, live)` (`on_attn(layer, live)`) returns, [B, S, D].

        `live` holds this run's activations as far as it has come. The last of its `mlp_out` (`attn_out`) is,
        while the function runs, the model's own output for that layer, and afterwards what replaced it.
        Attention's pattern and scale are there if `on_attn` is given. Differentiable with respect to what the
        functions return.
        """
        tokens = self._checked(tokens)
        live = self._live(tokens)
        return self._run(tokens, self._hooks(live, on_attn is not None, on_mlp, on_attn))

    def cross_entropy(self, tokens: Tensor, *, on_mlp: Replace | None = None, on_attn: Replace | None = None) -> Tensor:
        """Mean next-token cross-entropy in nats, [], at least in float32, with outputs replaced as in
        `replaced_logits`; without the prediction made at position 0 of a row. Raises ValueError for rows of fewer than
        3 tokens."""
        if tokens.ndim == 2 and tokens.shape[1] < 3:
            raise ValueError(
                f"tokens: expected rows of at least 3 tokens, as the prediction made at position 0 does not count, "
                f"got {tokens.shape[1]}"
            )
        logits = self.replaced_logits(tokens, on_mlp=on_mlp, on_attn=on_attn)
        targets = tokens[:, 2:].to(logits.device, torch.int64)
        # A row at a time: beside the logits there is never another tensor of their size.
        rows = [
            torch.nn.functional.cross_entropy(at_least_float32(row[1:-1]), target, reduction="sum")
            for row, target in zip(logits, targets, strict=True)
        ]
        return torch.stack(rows).sum() / targets.numel()

    @torch.no_grad()
    def attention_weights(self, layer: int) -> AttentionWeights:
        """The OV circuits of a layer's attention, at least in float32, with the gain and bias of the norm before it
        and the gain of one behind it folded in.

        Raises ValueError if they do not give the model's own attention output (attention sinks, gates and the like).
        """
        if not 0 <= layer < self.shape.layers:
            raise ValueError(f"layer: expected a covered layer, 0 to {self.shape.layers - 1}, got {layer}")
        block = self.bridge.blocks[layer]
        attn = block.attn
        repeat = self.shape.heads // len(attn.W_V)  # grouped-query attention: heads that share a value head
        W_V, W_O = at_least_float32(attn.W_V).repeat_interleave(repeat, 0), at_least_float32(attn.W_O)
        bias = W_O.new_zeros(self.shape.d_model) if attn.b_O is None else at_least_float32(attn.b_O)
        if attn.b_V is not None:
            b_V = at_least_float32(attn.b_V).repeat_interleave(repeat, 0)
            bias = bias + torch.einsum("he,hed->d", b_V, W_O)
        if self._norms.before_attention:
            gain, norm_bias = _gain_and_bias(block.get_submodule(self._norms.before_attention))
            if norm_bias is not None:
                bias = bias + torch.einsum("d,hde,hef->f", norm_bias, W_V, W_O)
            W_V = gain[:, None] * W_V
        if self._norms.behind_attention:
            gain, _ = _gain_and_bias(block.get_submodule(self._norms.behind_attention))
            W_O, bias = W_O * gain, bias * gain
        weights = AttentionWeights(W_V.clone(), W_O.clone(), bias.clone(), self.shape.centred)
        self._check_attention(layer, weights)
        return weights

    def mlp_norm(self, layer: int) -> tuple[Tensor, Tensor | None] | None:
        """Gain and bias [D] of the norm before a layer's MLP; None if there is no norm."""
        name = self._norms.before_mlp
        return None if name is None else _gain_and_bias(self.bridge.blocks[layer].get_submodule(name))

    def _live(self, tokens: Tensor) -> Activations:
        return of_whole_rows(tokens, self.shape.mlp_input)

    def _run(self, tokens: Tensor, hooks: list[Hook]) -> Tensor:
        with patterns_in_time(self.bridge, hooks) as hooks:
            return self.bridge.run_with_hooks(tokens, fwd_hooks=hooks, use_cache=False)

    def _checked(self, tokens: Tensor) -> Tensor:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"tokens: expected int32 or int64 of shape [B, S], got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if self.shape.context is not None and tokens.shape[1] > self.shape.context:
            raise ValueError(
                f"tokens: expected rows of at most {self.shape.context} tokens (the model's context), "
                f"got {tokens.shape[1]}; use shorter rows"
            )
        return tokens.to(self.bridge.cfg.device, torch.int64)

    def _hooks(
        self,
        live: Activations,
        attention: bool,
        on_mlp: Replace | None = None,
        on_attn: Replace | None = None,
    ) -> list[Hook]:
        return recording_hooks(self.shape.layers, self._norms, live, attention, on_mlp, on_attn)

    def _check_hooks(self) -> None:
        names = [name for name, _ in self._hooks(Activations(torch.empty(0), torch.empty(0)), attention=True)]
        missing = [name for name in names if name not in self.bridge.hook_dict]
        if missing:
            raise ValueError(
                f"model.path: expected blocks of attention and MLP (as in GPT-2, Pythia, Llama, Gemma), but "
                f"{self._class_name} has no {missing[0]}"
            )

    def _probe(self, attention: bool) -> Activations:
        length = min(PROBE_TOKENS, self.shape.context or PROBE_TOKENS)
        probe = self.capture(torch.arange(length)[None] % self.shape.vocab, attention=attention)
        if self.dtype == torch.float16 and not all(y.isfinite().all() for y in [probe.r_0, *probe.x, *probe.mlp_out]):
            raise ValueError(
                f"model.dtype: {self._class_name} overflows in fp16, which ends at 65,504; expected 'bf16' or 'fp32'"
            )
        return probe

    def _check_residual(self) -> None:
        probe = self._probe(attention=False)
        for layer in range(self.shape.layers):
            residual = probe.residual(layer, after_attention=not self.shape.parallel)
            read = centre(residual) if self.shape.centred else residual
            if not close(probe.x[layer] * probe.scale[layer][..., None], read, self.dtype):
                raise ValueError(
                    f"model.path: expected an MLP that reads the plain sum of the embedding and all earlier "
                    f"attention and MLP outputs, which layer {layer} of {self._class_name} does not "
                    f"(scaled residual branches, for example)"
                )

    def _check_attention(self, layer: int, weights: AttentionWeights) -> None:
        probe = self._probe(attention=True)
        post_scale = probe.attn_post_scale[layer] if probe.attn_post_scale else None
        written = attention_write(probe.residual(layer), probe.mix(layer), weights, post_scale)
        if not close(written, probe.attn_out[layer], self.dtype):
            raise ValueError(
                f"attention: expected attention outputs that are linear given pattern and scale, which layer "
                f"{layer} of {self._class_name} does not have; train without attention modules on this model"
            )


def _gain_and_bias(norm: Any) -> tuple[Tensor, Tensor | None]:
    """A norm's, [D] each, in float32 at least. RMSNorm bridges have no bias: the wrapped module decides."""
    bias = getattr(norm.original_component, "bias", None)
    gain = at_least_float32(norm.weight) + norm.uses_weight_offset
    return gain, None if bias is None else at_least_float32(bias)
