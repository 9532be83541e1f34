"""The latents of a CLT as circuit-tracer's page reads them: one binary file per layer, and an index of its parts."""

import gzip
import json
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.language_model.language_model import LanguageModel
from sparseclt.language_model.unembedding import logit_directions
from sparseclt.model.clt import SparseCLT
from sparseclt.observations.gather import Gathered, gather
from sparseclt.observations.pages import LatentPage, latent_pages
from sparseclt.observations.token_texts import token_texts

GROUPS = ("Top activations", "First quarter", "Second quarter", "Third quarter", "Last quarter")


class Observed:
    """What the latents of `clt` do in vanilla mode on rows [R, S]: a context, within which it may be read."""

    def __init__(self, clt: SparseCLT, language_model: LanguageModel, rows: Tensor):
        self.clt, self.language_model, self.rows = clt, language_model, rows
        self.texts = token_texts(language_model.tokenizer, language_model.shape.vocab)
        self.folder = tempfile.TemporaryDirectory()
        self.gathered: Gathered | None = None

    def __enter__(self) -> "Observed":
        self.gathered = gather(self.clt, self.language_model, self.rows, Path(self.folder.name), modes=["vanilla"])
        dtype = torch.promote_types(self.language_model.dtype, torch.float32)
        self.directions, _ = logit_directions(self.language_model, dtype=dtype)
        return self

    def __exit__(self, *_: object) -> None:
        self.gathered = None
        self.folder.cleanup()

    @property
    def tokens(self) -> int:
        """How many tokens count."""
        assert self.gathered is not None
        return self.gathered.counted

    def pages(self, module: int) -> Iterator[LatentPage]:
        """The latents of a module, in order."""
        assert self.gathered is not None
        return latent_pages(self.clt, module, self.gathered, self.directions)

    def text(self, tokens: Sequence[int]) -> list[str]:
        """Tokens as text."""
        return [self.texts[token] for token in tokens]


def write_latents(clt: SparseCLT, language_model: LanguageModel, rows: Tensor, name: str, directory: Path) -> None:
    """Write what the latents do on `rows` [R, S], for circuit-tracer's page: `index.json.gz`, and `layer_{l}.bin`, in
    which each latent is a length (uint32, little-endian) and that many bytes of zlib with JSON inside."""
    directory.mkdir()
    index: list[dict[str, Any]] = []
    with Observed(clt, language_model, rows) as observed:
        for module in range(len(clt.sites)):
            offsets, filename = [0], f"layer_{module}.bin"
            with (directory / filename).open("wb") as file:
                for page in observed.pages(module):
                    packed = zlib.compress(json.dumps(_latent(observed, page, f"{name}/{module}")).encode())
                    file.write(len(packed).to_bytes(4, "little") + packed)
                    offsets.append(offsets[-1] + 4 + len(packed))
            index.append({"filename": filename, "offsets": offsets})
    (directory / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode(), mtime=0))


def _latent(observed: Observed, page: LatentPage, transcoder: str) -> dict[str, Any]:
    quantiles = [{"quantile_name": title, "examples": _examples(observed, page, g)} for g, title in enumerate(GROUPS)]
    return {
        "transcoder_id": transcoder,
        "index": page.latent,
        "examples_quantiles": [quantile for quantile in quantiles if quantile["examples"]],
        "top_logits": observed.text(page.logits.top[0].tolist()),
        "bottom_logits": observed.text(page.logits.bottom[0].tolist()),
        "act_min": 0.0,
        "act_max": page.largest,
        "quantile_values": page.percentiles,
        "histogram": page.bins,
        "activation_frequency": page.fired / observed.tokens,
    }


def _examples(observed: Observed, page: LatentPage, group: int) -> list[dict[str, Any]]:
    return [
        {
            "tokens": observed.text(example.tokens),
            "tokens_acts_list": example.values,
            "train_token_ind": example.position,
            "is_repeated_datapoint": False,
        }
        for example in page.examples
        if example.group == group
    ]
