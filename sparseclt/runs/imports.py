"""A CLT of another tool on the user's own text: connections chosen for it, and room for all of its latents."""

import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sparseclt.config import CLTConfig, TrainConfig
from sparseclt.connections.policies import check_connections
from sparseclt.connections.selection import select_top_connections
from sparseclt.data.sources import Split
from sparseclt.data.text import load_rows
from sparseclt.data.tokens import check_token_ids
from sparseclt.evaluation.metrics import Evaluation, captures
from sparseclt.evaluation.reconnected import activity_on
from sparseclt.formats.registry import SparseCLT, read_foreign
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.nonlinearity import full_rows
from sparseclt.model.sites import Mode
from sparseclt.runs.measurement import held_out_rows, measure
from sparseclt.storage.run_config import CLT, check_unused, note_import, write_config
from sparseclt.training.run_directory import Identity, run_directory, write_identity

BATCH_ROWS = 4
SPLITS: tuple[Split, ...] = ("train", "held_out")


class Imported(NamedTuple):
    """What `import_clt` makes: the configuration as that of a run, the CLT, its language model, and the text [R, S]."""

    config: TrainConfig
    clt: SparseCLT
    language_model: LanguageModel
    rows: Tensor


@torch.no_grad()
def import_clt(path: str | Path, config: TrainConfig, input_hook: str | None = None) -> Imported:
    """The CLT in directory `path`, of another tool, with the connections that `config` asks for, chosen as training
    chooses them: on `config.connections.recent_tokens` of the training text.

    With another activation than TopK, a token gets room for as many latents as any token needs in that text and in the
    held-out text, in either mode: `clt.architecture.active` is doubled, from what the directory says or 1, until none
    is left out. Raises ValueError, naming the argument, for a model, a text or connections that do not fit.
    """
    if config.connections.policy not in ("top", "none"):
        found = repr(config.connections.policy)
        raise ValueError(
            f"connections.policy: expected 'top' or 'none' for a CLT that is not trained here, got {found}"
        )
    foreign = read_foreign(path)
    config = replace(config, model=replace(config.model, layers=len(foreign.tensors)))
    model = LanguageModel.of(config)
    texts = [load_rows(config, model.tokenizer, split) for split in SPLITS]
    for rows in texts:
        check_token_ids(rows, model.shape.vocab, model.tokenizer)
    train, held_out = texts
    some = train[: max(1, config.connections.recent_tokens // train.shape[1])]
    held_out = held_out[: max(1, config.data.held_out_tokens // held_out.shape[1])]
    topk = foreign.activation == "topk"
    clt = SparseCLT.from_pretrained(
        path, model.device, language_model=model, active=None if topk else foreign.active or 1, input_hook=input_hook
    )
    model = model.reading(clt.architecture.model.mlp_input)
    half = clt.transcoder(0).W_enc.dtype == torch.bfloat16
    clt = clt if half else clt.float()  # fp16 and fp64 are no data types of runs
    _give_room(clt, model, (some, held_out), "vanilla", config)
    if config.connections.policy == "top" and clt.reads_upstream:
        _choose_connections(clt, model, some, config)
        _give_room(clt, model, (some, held_out), "sparse", config)
    a = clt.architecture
    dtype: Literal["fp32", "bf16"] = "bf16" if half else "fp32"
    shape = CLTConfig(
        latents=a.latents, active=a.active, active_ratio=a.active_ratio, activation=a.activation, targets=a.targets,
        dtype=dtype,
    )  # fmt: skip
    return Imported(replace(config, clt=shape), clt, model, train)


def _choose_connections(clt: SparseCLT, language_model: LanguageModel, rows: Tensor, config: TrainConfig) -> None:
    """Give every latent of `clt` the connections that matter most on `rows` [R, S]."""
    c, backend = config.connections, config.compute.backend
    check_connections(clt, c.per_latent)
    activity = activity_on(clt, language_model, rows, BATCH_ROWS, backend, c.importance)
    clt.connect(select_top_connections(clt, activity, c.per_latent, c.importance, backend))


def _give_room(
    clt: SparseCLT, language_model: LanguageModel, texts: Iterable[Tensor], mode: Mode, config: TrainConfig
) -> None:
    """Double `clt.architecture.active` until no token of `texts`, [R, S] each, fills all its slots in `mode`. TopK has
    as many slots as it wants."""
    if clt.architecture.activation == "topk":
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* as many as they have room for")  # as is looked for here
        for rows in texts:
            for _, activations in captures(clt, language_model, rows, BATCH_ROWS):
                while (a := clt.architecture).slots < a.latents and any(
                    full_rows(latents) for latents in clt(activations, mode, backend=config.compute.backend).latents
                ):
                    clt.architecture = replace(a, active=min(2 * a.active, a.latents))


def import_run(path: str | Path, config: TrainConfig, input_hook: str | None = None) -> Evaluation:
    """Make a finished run of the CLT in directory `path`, which another tool wrote, in directory `config.out`, on the
    model and text of `config`, and evaluate it. Connections are chosen for it, nothing is trained."""
    check_unused(config.out)
    config, clt, model, rows = import_clt(path, config, input_hook)
    run = Path(config.out)
    with run_directory(run, begun=lambda: (run / CLT).is_dir()):
        write_identity(run, Identity.of(model, rows))
        write_config(run, config)
        note_import(run, path, model.shape.mlp_input)
        clt.save_pretrained(run / CLT)
    return measure(config, clt, model, held_out_rows(config, model))
