"""From a run directory to a folder of pages."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseclt import __version__
from sparseclt.atlas import connections, folder
from sparseclt.atlas.graphs import copy_graphs
from sparseclt.atlas.latents import SHARD, ModulePages
from sparseclt.atlas.tokens import TokenIndex
from sparseclt.config import TrainConfig, to_dict
from sparseclt.data.text import Split, load_rows
from sparseclt.evaluation.metrics import modes_of
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.language_model.unembedding import logit_directions
from sparseclt.model.clt import SparseCLT
from sparseclt.observations.gather import Gathered, gather
from sparseclt.observations.token_texts import token_texts
from sparseclt.storage.directories import MANIFEST, atomic_directory
from sparseclt.storage.run_config import CLT, read_config
from sparseclt.training.loggers import read_metrics
from sparseclt.training.run_directory import METRICS, finished_clt, language_model_of

ATLAS, FORMAT = "run.json.gz", 1
TOKEN_SHARD = 256  # tokens whose latents share a file
POINTS = 400  # of a curve


def build_atlas(
    run: str | Path, out: str | Path | None = None, *, tokens: int | None = None, split: Split = "held_out"
) -> Path:
    """Write the atlas of a finished run to the directory `out` (RUN/atlas by default); returns that path.

    An atlas of the same run and text that is there already is kept; only the graphs in RUN/graphs are taken in anew.

    tokens: how many of the text to run over. None: as many as an evaluation does.

    Raises ValueError for a run that is not finished, for another model or tokenizer than it was trained on, for fewer
    tokens than one row, and for an `out` that holds something other than an atlas.
    """
    run = Path(run)
    out = checked_out(run / "atlas" if out is None else Path(out))
    config = read_config(run)
    path = finished_clt(run, config.steps)
    wanted = config.data.held_out_tokens if tokens is None else tokens
    if wanted < config.data.row_tokens and tokens is not None:
        raise ValueError(f"tokens: expected at least one row of {config.data.row_tokens} tokens, got {tokens}")
    identity = _identity(run, config, wanted, split)
    if not (out / "data" / ATLAS).is_file() or folder.read(out / "data" / ATLAS).get("identity") != identity:
        language_model = language_model_of(run, config)
        clt = SparseCLT.from_pretrained(path, device=language_model.device)
        rows = load_rows(config, language_model.tokenizer, split)
        about = {
            "name": run.resolve().name,
            "identity": identity,
            "config": to_dict(config),
            "evaluation": _json(run / "evaluation.json"),
            "metrics": curves(read_metrics(run / METRICS)) if (run / METRICS).is_file() else {},
            "split": split,
        }
        rows = rows[: max(1, wanted // rows.shape[1])]
        write_atlas(clt, language_model, rows, out, about, backend=config.compute.backend)
    add_graphs(run / "graphs", out)
    return out


def add_graphs(graphs: Path, out: Path) -> None:
    """Take the Graph JSON files of directory `graphs` into the atlas in `out`."""
    content = folder.read(out / "data" / ATLAS)
    folder.write(out / "data" / ATLAS, content | {"graphs": copy_graphs(graphs, out / "data")})


def write_atlas(
    clt: SparseCLT,
    language_model: LanguageModel,
    rows: Tensor,
    out: str | Path,
    about: Mapping[str, Any],
    *,
    backend: str | None = None,
) -> Path:
    """Write the pages of `clt` on token rows [R, S] to directory `out`, whole or not at all.

    about: what the overview shows beside the figures of this text: `name`, `config`, `evaluation`, `metrics`, `split`.
    """
    with (
        atomic_directory(checked_out(Path(out))) as directory,
        tempfile.TemporaryDirectory(dir=directory.parent) as temporary,
    ):
        gathered = gather(clt, language_model, rows, Path(temporary), backend=backend)
        _write_data(directory / "data", clt, language_model, gathered, about)
        for file in resources.files("sparseclt.atlas").joinpath("web").iterdir():
            (directory / file.name).write_bytes(file.read_bytes())
    return Path(out)


def checked_out(out: Path) -> Path:
    """`out` itself. Raises ValueError if it is a file, or a directory with anything but an atlas, which must not be
    replaced."""
    if out.exists() and not (out / "data" / ATLAS).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"out: expected an atlas, an empty directory or a new one, got {out}; choose another")
    return out


def curves(lines: list[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Metrics by name, at most POINTS steps of them, for plots; a metric that a step lacks is None there."""
    lines = [lines[i] for i in np.unique(np.linspace(0, len(lines) - 1, POINTS).round().astype(int))] if lines else []
    names = {name: None for line in lines for name in line}
    return {name: [line.get(name) for line in lines] for name in names}


@torch.no_grad()
def _write_data(
    data: Path, clt: SparseCLT, language_model: LanguageModel, gathered: Gathered, about: Mapping[str, Any]
) -> None:
    F, modes = clt.architecture.latents, modes_of(clt)
    vocabulary = language_model.shape.vocab
    indices = {mode: TokenIndex(gathered.rows, vocabulary) for mode in modes}
    incoming = connections.incoming(clt, gathered)
    outgoing = connections.outgoing(incoming, len(clt.sites) * F)
    directions, _ = logit_directions(language_model, dtype=torch.promote_types(language_model.dtype, torch.float32))
    modules = []
    for m in range(len(clt.sites)):
        pages = ModulePages(clt, m, gathered, incoming[m], outgoing, directions, indices)
        modules.append(pages.write(data))
    _write_tokens(data, indices, gathered.rows, token_texts(language_model.tokenizer, vocabulary))
    content = {
        **about,
        "format": FORMAT,
        "modes": modes,
        "latents": F,
        "shard": SHARD,
        "token_shard": TOKEN_SHARD,
        "rows": list(gathered.rows.shape),
        "tokens": gathered.counted,
        "architecture": clt.architecture.to_dict(),
        "modules": modules,
        "flow": folder.rounded(connections.flow(clt, gathered)) if "sparse" in modes else None,
    }
    folder.write(data / ATLAS, folder.finite(content))


def _write_tokens(data: Path, indices: Mapping[Any, TokenIndex], rows: NDArray[np.int32], texts: list[str]) -> None:
    counts = np.bincount(rows.reshape(-1), minlength=len(texts))
    folder.write(data / "vocabulary.json.gz", {"texts": texts, "counts": counts.tolist()})
    found = {mode: index.by_token() for mode, index in indices.items()}
    for first in range(0, len(texts), TOKEN_SHARD):
        tokens = range(first, min(first + TOKEN_SHARD, len(texts)))
        shard = {
            str(t): {mode: latents[t] for mode, latents in found.items() if t in latents}
            for t in tokens
            if any(t in latents for latents in found.values())
        }
        if shard:
            folder.write(data / "tokens" / f"{first // TOKEN_SHARD}.json.gz", shard)


def _identity(run: Path, config: TrainConfig, tokens: int, split: Split) -> str:
    """A digest of everything that an atlas depends on; of local text and models, the dates and sizes of their files."""
    parts: list[Any] = [FORMAT, __version__, tokens, split, to_dict(config)]
    for file in (run / CLT / MANIFEST, run / "evaluation.json", run / METRICS):
        parts.append(hashlib.blake2b(file.read_bytes()).hexdigest() if file.is_file() else None)
    for name in (config.data.source, config.model.path):
        path = Path(name).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        parts.append([[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()])
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _json(file: Path) -> Any:
    return json.loads(file.read_text()) if file.is_file() else None
