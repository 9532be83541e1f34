"""From text to rows of tokens, and an endless, resumable stream of batches of rows."""

import gzip
import json
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.language_model.files import looks_like_path

Split = Literal["train", "held_out"]
SUFFIXES = (".txt", ".jsonl", ".json")
HUB_NAMES: dict[Split, list[str]] = {"train": ["train"], "held_out": ["held_out", "validation", "test"]}
EXPECTED = "'embedded', an existing file or directory, or a data set on the Hugging Face hub"
DOCUMENTS_AT_ONCE = 64  # handed to the tokenizer, which works on several in parallel


class NoHeldOutSplit(LookupError):
    """The source has no held-out documents of its own: split off rows with `split_held_out`."""


def read_documents(source: str, split: Split, text_field: str = "text") -> Iterator[str]:
    """The documents of one split; those without any text are left out.

    `source`: "embedded"; a .txt (one document), .jsonl or .json file, or one of these gzipped; a directory of
    .txt and .jsonl files, in order of name, where files named `held_out` (held_out.jsonl.gz) are the held-out
    split; or "hf:NAME", "hf:NAME:CONFIG" or NAME for `datasets.load_dataset`, streamed, where the held-out
    split is called held_out, validation or test. JSON holds strings, or objects with the text under
    `text_field`.

    Raises ValueError for a source that does not exist or has no text, NoHeldOutSplit if "held_out" is asked
    for and there is none.
    """
    if split not in HUB_NAMES:
        raise ValueError(f"split: expected 'train' or 'held_out', got {split!r}")
    if source == "embedded":
        from sparseclt import embedded

        return _read_files([embedded.corpus(split)], text_field)
    path = Path(source).expanduser()
    if path.exists():
        return _read_files(_local_files(path, split), text_field)
    if not source.startswith("hf:") and looks_like_path(source.partition(":")[0]):
        raise ValueError(f"data.source: expected {EXPECTED}, got {source!r}, which does not exist")
    return _read_hub(source.removeprefix("hf:"), split, text_field)


def token_rows(tokenizer: Any, documents: Iterable[str], row_length: int, *, max_tokens: int | None = None) -> Tensor:
    """Documents one after another, each begun by the BOS (or else EOS) token, as int32 rows [R, row_length].

    What is left over behind the last whole row is dropped. Reading ends with the first `max_tokens` tokens.
    Raises ValueError if there is no document or too little text for one row.
    """
    if row_length < 2:
        raise ValueError(f"row_length: expected at least 2 tokens, got {row_length}")
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("tokenizer: expected one with a BOS or EOS token, to begin documents with, got neither")
    ids, documents = array("i"), iter(documents)
    while max_tokens is None or len(ids) < max_tokens:
        texts = list(islice(documents, DOCUMENTS_AT_ONCE))
        if not texts:
            break
        for document in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.append(start)
            ids.extend(document)
    if not ids:
        raise ValueError("documents: expected at least one document, got an empty data set")
    ids = ids[:max_tokens]
    rows = len(ids) // row_length
    if rows == 0:
        raise ValueError(
            f"documents: expected at least one row of {row_length} tokens, got {len(ids)} tokens; "
            f"give more text or shorter rows"
        )
    return torch.tensor(ids[: rows * row_length], dtype=torch.int32).view(rows, row_length)


def split_held_out(rows: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows [R, S] in two, at random but always the same for a seed: the rest, and about `fraction` held out.

    Both keep the order of the rows and get at least one. Raises ValueError if that cannot be.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected more than 0 and less than 1, got {fraction}")
    if len(rows) < 2:
        raise ValueError(f"rows: expected at least 2 to hold some out, got {len(rows)}; give more text")
    held_out = min(max(1, round(fraction * len(rows))), len(rows) - 1)
    chosen = torch.zeros(len(rows), dtype=torch.bool)
    chosen[permutation(len(rows), seed, 0)[:held_out]] = True
    return rows[~chosen], rows[chosen]


def load_rows(config: TrainConfig, tokenizer: Any, split: Split) -> Tensor:
    """The token rows [R, S] of one split of the text that `config` names."""
    data = config.data
    try:
        held_out = read_documents(data.source, "held_out", data.text_field)
    except NoHeldOutSplit:
        documents = read_documents(data.source, "train", data.text_field)
        rows = token_rows(tokenizer, documents, data.row_tokens, max_tokens=data.max_tokens)
        return split_held_out(rows, data.held_out_share, config.seed)[split == "held_out"]
    if split == "held_out":
        most = max(data.held_out_tokens, data.row_tokens)
        return token_rows(tokenizer, held_out, data.row_tokens, max_tokens=most)
    documents = read_documents(data.source, "train", data.text_field)
    return token_rows(tokenizer, documents, data.row_tokens, max_tokens=data.max_tokens)


class RowStream:
    """Batches [batch_rows, S] of shuffled rows [R, S], forever; a batch may run on into the next epoch.

    `position`, the number of rows given out so far, is the whole state: a stream made with another's position
    goes on exactly where that one is. An epoch's order depends on the seed and its number only.
    """

    def __init__(self, rows: Tensor, batch_rows: int, seed: int, position: int = 0):
        if rows.ndim != 2 or len(rows) == 0:
            raise ValueError(f"rows: expected at least one row, [R, S], got shape {tuple(rows.shape)}")
        if batch_rows < 1:
            raise ValueError(f"batch_rows: expected at least 1, got {batch_rows}")
        if position < 0:
            raise ValueError(f"position: expected a number of rows, got {position}")
        self.rows, self.batch_rows, self.seed, self.position = rows, batch_rows, seed, position
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __iter__(self) -> "RowStream":
        return self

    def __next__(self) -> Tensor:
        return self.rows[self.take()]

    def take(self) -> Tensor:
        """Which rows, [batch_rows], the next batch has: `__next__` without the rows themselves."""
        chosen, missing = [], self.batch_rows
        while missing:
            epoch, offset = divmod(self.position, len(self.rows))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, permutation(len(self.rows), self.seed, epoch)
            chosen.append(self._order[offset : offset + missing])
            self.position += len(chosen[-1])
            missing -= len(chosen[-1])
        return torch.cat(chosen)


def permutation(length: int, *seeds: int) -> Tensor:
    """The numbers 0 to length - 1 in an order that follows from `seeds`."""
    import numpy as np

    return torch.from_numpy(np.random.default_rng(seeds).permutation(length))


def _local_files(path: Path, split: Split) -> list[Path]:
    if path.is_file():
        if split == "held_out":
            raise NoHeldOutSplit(f"data.source: {str(path)!r} is one file, without a held-out split")
        return [path]
    files = [f for f in sorted(path.iterdir()) if f.name.removesuffix(".gz").endswith((".txt", ".jsonl"))]
    if not files:
        raise ValueError(f"data.source: expected .txt or .jsonl files (or .gz of these), got none in {str(path)!r}")
    held_out = [f for f in files if f.name.split(".")[0] == "held_out"]
    if split == "train":
        return [f for f in files if f not in held_out]
    if not held_out:
        raise NoHeldOutSplit(f"data.source: {str(path)!r} has no file named held_out")
    return held_out


def _read_files(files: list[Path], text_field: str) -> Iterator[str]:
    for file in files:
        if not file.name.removesuffix(".gz").endswith(SUFFIXES):
            raise ValueError(f"data.source: expected a .txt, .jsonl or .json file (or .gz), got {str(file)!r}")
    return (text for file in files for text in _read_file(file, text_field) if text.strip())


def _read_file(file: Path, text_field: str) -> Iterator[str]:
    read = gzip.open if file.suffix == ".gz" else open
    with read(file, "rt", encoding="utf-8") as lines:
        kind = Path(file.name.removesuffix(".gz")).suffix
        if kind == ".txt":
            yield lines.read()
        elif kind == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text(_parse(line, f"{file}, line {number}"), text_field, f"{file}, line {number}")
        else:
            records = _parse(lines.read(), str(file))
            for number, record in enumerate(records if isinstance(records, list) else [records], 1):
                yield _text(record, text_field, f"{file}, record {number}")


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"data.source: expected JSON in {where}: {error}") from error


def _text(record: Any, text_field: str, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"data.source: expected text or an object in {where}, got {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"data.text_field: expected one of the fields {sorted(record)} of {where}, got {text_field!r}")
    if not isinstance(record[text_field], str):
        raise ValueError(
            f"data.text_field: expected a field of text, but {text_field!r} in {where} is "
            f"{type(record[text_field]).__name__}"
        )
    return record[text_field]


def _read_hub(name: str, split: Split, text_field: str) -> Iterator[str]:
    import datasets

    path, _, config = name.partition(":")
    try:
        found = datasets.get_dataset_split_names(path, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"data.source: expected {EXPECTED}, got {name!r}, which is no local path and could not be read "
            f"from the hub: {error}"
        ) from error
    chosen = [s for s in HUB_NAMES[split] if s in found]
    if not chosen and split == "held_out":
        raise NoHeldOutSplit(f"data.source: {name!r} has the splits {sorted(found)}, none held out")
    if not chosen:
        raise ValueError(f"data.source: expected a split named 'train', but {name!r} has {sorted(found)}")
    records = datasets.load_dataset(path, config or None, split=chosen[0], streaming=True)
    return (text for record in records if (text := _text(record, text_field, f"{name}, {chosen[0]}")).strip())
