"""The latents of a CLT as Neuronpedia imports them: JSON lines, one folder per layer.

The fields are those of the columns that its importer fills (github.com/hijohnnylin/neuronpedia); it fills the others
with their defaults.
"""

import gzip
import json
import re
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from sparseclt.export.latent_files import Observed
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.observations.pages import Example, LatentPage
from sparseclt.storage.directories import atomic_directory

BATCH = 256  # latents in a file
CREATOR = "sparseclt"  # the user of the instance to whom all this belongs there


def write(clt: SparseCLT, language_model: LanguageModel, rows: Tensor, name: str, path: Path) -> None:
    """Write what the latents of `clt` do on `rows` [R, S] in vanilla mode to directory `path`.

    `name`: that of the set of sources. Raises ValueError for attention latents, for which it has no layers.
    """
    if clt.architecture.attention != "frozen":
        raise ValueError("clt: expected attention 'frozen', got 'latents', for which Neuronpedia has no place")
    model, name = _identifier(Path(language_model.shape.name).name), _identifier(name)
    with atomic_directory(path) as directory, Observed(clt, language_model, rows) as observed:
        for layer in range(len(clt.sites)):
            source = f"{layer}-{name}"
            folder = directory / model / source
            _write_head(folder, clt, model, name, source, rows)
            keys = {"modelId": model, "layer": source}
            latents = observed.pages(layer)
            for number in count():
                if not (pages := list(islice(latents, BATCH))):
                    break
                features = (keys | _feature(observed, page) for page in pages)
                _write_lines(folder / "features" / f"batch-{number}.jsonl.gz", features)
                activations = (keys | line for page in pages for line in _activations(observed, page, source))
                _write_lines(folder / "activations" / f"batch-{number}.jsonl.gz", activations)


def _identifier(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "model"


def _write_head(folder: Path, clt: SparseCLT, model: str, name: str, source: str, rows: Tensor) -> None:
    """The lines that describe release, model, set and source."""
    shape, latents = clt.architecture.model, clt.architecture.latents
    text = {"description": f"Cross-layer transcoder, {latents} latents per layer", "creatorName": CREATOR}
    size = {"layers": shape.layers, "neuronsPerLayer": latents, "dimension": shape.d_model}
    prompts = {"num_prompts": rows.shape[0], "num_tokens_in_prompt": rows.shape[1]}
    lines: dict[str, dict[str, Any]] = {
        "release": {"name": name, "descriptionShort": text["description"], "urls": [], **text},
        "model": {"id": model, "displayName": model, "displayNameShort": model, "owner": "", **size},
        "sourceset": {"modelId": model, "name": name, "releaseName": name, **text},
        "source": {"id": source, "modelId": model, "setName": name, **prompts},
    }
    folder.mkdir(parents=True)
    for kind, line in lines.items():
        (folder / f"{kind}.jsonl").write_text(json.dumps({"creatorId": CREATOR} | line) + "\n")


def _write_lines(file: Path, lines: Iterator[Mapping[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    file.write_bytes(gzip.compress(text.encode(), mtime=0))


def _feature(observed: Observed, page: LatentPage) -> dict[str, Any]:
    width = page.largest / len(page.bins)
    return {
        "index": str(page.latent),
        "creatorId": CREATOR,
        "maxActApprox": page.largest,
        "frac_nonzero": page.fired / observed.tokens,
        "pos_str": observed.text(page.logits.top[0].tolist()),
        "pos_values": page.logits.top_values[0].tolist(),
        "neg_str": observed.text(page.logits.bottom[0].tolist()),
        "neg_values": page.logits.bottom_values[0].tolist(),
        "freq_hist_data_bar_heights": page.bins if page.fired else [],
        "freq_hist_data_bar_values": [(i + 0.5) * width for i in range(len(page.bins))] if page.fired else [],
        "logits_hist_data_bar_heights": page.logit_bins.counts,
        "logits_hist_data_bar_values": page.logit_bins.middles,
    }


def _activations(observed: Observed, page: LatentPage, source: str) -> Iterator[dict[str, Any]]:
    """Each example with the range of values that it stands for: its group's, from `binMin` to `binMax`."""
    for number, example in enumerate(page.examples):
        low, high, share = _range(page, example)
        yield {
            "id": f"{source}-{page.latent}-{number}",
            "index": str(page.latent),
            "creatorId": CREATOR,
            "tokens": observed.text(example.tokens),
            "values": example.values,
            "maxValue": max(example.values),
            "maxValueTokenIndex": max(range(len(example.values)), key=example.values.__getitem__),
            "minValue": min(example.values),
            "qualifyingTokenIndex": example.position,
            "binMin": low,
            "binMax": high,
            "binContains": share,
        }


def _range(page: LatentPage, example: Example) -> tuple[float, float, float]:
    """The range of values of an example's group, and the share of the latent's firings in it: a quarter of them, or,
    for the largest values, none."""
    value = example.values[example.position]
    if example.group == 0:
        return value, page.largest, 0.0
    bounds = [page.smallest, *(page.percentiles[p - 1] for p in (25, 50, 75, 100))]
    quarter = 4 - example.group
    return min(bounds[quarter], value), max(bounds[quarter + 1], value), 0.25
