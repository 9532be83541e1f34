"""SparseCLT: a cross-layer transcoder that runs in vanilla and in sparsely-connected mode."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

import torch

from sparseclt.model import pretrained
from sparseclt.model.activations import Activations
from sparseclt.model.decoder_gradients import DecoderGradients
from sparseclt.model.forward import ForwardPass
from sparseclt.model.hub import HubModel
from sparseclt.model.sites import Mode, Open
from sparseclt.storage.hub import Download, local_directory

P = ParamSpec("P")
R = TypeVar("R")


def in_evaluation_mode(function: Callable[Concatenate["SparseCLT", P], R]) -> Callable[Concatenate["SparseCLT", P], R]:
    """Decorates a function whose first argument is a CLT: the CLT is in evaluation mode while the function runs."""

    @wraps(function)
    def run(clt: "SparseCLT", *args: P.args, **keywords: P.kwargs) -> R:
        training = clt.training
        clt.eval()
        try:
            return function(clt, *args, **keywords)
        finally:
            clt.train(training)

    return run


class SparseCLT(HubModel):
    """A sparsely-connected cross-layer transcoder.

    Vanilla mode: every encoder reads the model's own residual stream. Sparsely-connected mode: each latent is
    computed from the embedding, the frozen attention outputs (`attention="frozen"`) or attention latents
    (`attention="latents"`), and at most C upstream latents through virtual weights. Source of the method:
    Jacob Drori, "Sparsely-connected Cross-layer Transcoders" (2025).

    `attention_weights`: the OV circuits of every layer, needed for `attention="latents"`.

    An `nn.Module` in every respect: `.to(device)`, `state_dict()`, `load_state_dict` and `copy.deepcopy` include
    the connections. With activation "batchtopk" its latents depend on the batch in training mode (`.train()`, the
    state of a new CLT), not in evaluation mode (`.eval()`, that of one that was loaded).
    """

    def forward(
        self,
        activations: Activations,
        mode: Mode,
        *,
        backend: str | None = None,
        error_nodes: bool = False,
        gradients: DecoderGradients | None = None,
        open_connections: Open = "own",
    ) -> ForwardPass:
        """All modules on one batch of captured activations, in `mode` "vanilla" or "sparse".

        The pass holds `latents` (one entry per module, in model order) and `output(site)`, the reconstruction [N, D].
        `error_nodes` (sparsely-connected mode): what each module failed to reconstruct is added to the stream
        that later modules read, as in circuit tracing. With all connections open, both modes then agree.
        `gradients`: collects the decoders' gradient in the backward pass, instead of their `.grad`.
        `open_connections` (sparsely-connected mode): "all" or "none" of the upstream latents are read, instead of the
        CLT's "own" connections. With "all" nothing of size F x U exists, and the CLT needs no connections.
        """
        forward = ForwardPass(self, mode, backend, error_nodes, gradients, open_connections)
        for site in self.sites:
            forward.advance(site, activations)
        return forward

    @classmethod
    def from_pretrained(  # type: ignore[override]  # that of the hub's mixin begins with a search for config.json
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        language_model: Any = None,
        active: int | None = None,
        input_hook: str | None = None,
        **download: Unpack[Download],
    ) -> "SparseCLT":
        """Read what `save_pretrained` or a training run wrote, a checkpoint included; every file is checked against its
        digest. Or read a directory of circuit-tracer, Gemma Scope 2, sparsify, clt-training or SAELens, recognised by
        its files: a CLT, or a set of per-layer transcoders (`Architecture.targets`), without connections.

        `path`: a directory, or the name of a repository on the Hugging Face hub ("owner/name"), to which `download`
        applies (`revision`, `token`, `cache_dir`, `force_download`, `local_files_only`).
        `device`: where it goes. None: the CPU. `dtype`: of its weights. None: as they were saved. The logits of
        learned connections keep theirs, and thresholds have at least fp32.

        For directories of other tools: `language_model`, the `LanguageModel` that it was trained on. `active`: with
        another activation than TopK, the mean number of active latents per token; a token has room for 4 times as many.
        `input_hook`, where the directory leaves it open: "mlp.hook_in" if encoders read the MLP's own input,
        "ln2.hook_normalized" if they read before the gain and bias of the norm.

        Raises ValueError, naming the argument that is missing; CheckpointError, naming the file, for a damaged one and
        for what a CLT of this kind cannot hold.
        """
        options = {"language_model": language_model, "active": active, "input_hook": input_hook}
        architecture, attention, tensors = pretrained.read(local_directory(path, download), **options)
        clt = cls(architecture, attention).to(device=device, dtype=dtype or pretrained.dtype_of(tensors))
        for module in clt:
            module.keep_wide_thresholds()
        pretrained.load_tensors(clt, tensors)
        clt.warns_when_full = language_model is not None
        clt.eval()
        return clt
