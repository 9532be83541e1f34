"""From the text that a configuration names to its rows of token ids."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.data.documents import passages
from sparseclt.data.held_out import Group, divided, grouped
from sparseclt.data.sources import NoHeldOutSplit, Source, Split, open_source
from sparseclt.data.token_store import Entry, TokenStore
from sparseclt.data.tokens import BOS, RowWriter, SpecialTokens, Stored, token_ids, with_facts
from sparseclt.language_model.identity import tokenizer_digest

FORMAT = 1  # of what is written, and of how text becomes rows
BAR_AFTER = 2  # seconds: short texts show no progress bar


def load_rows(config: TrainConfig, tokenizer: Any, split: Split) -> Tensor:
    """The token rows [R, S] of one split of the text that `config` names, int32, mapped from a file.

    The text is tokenized once, and the ids are kept in `config.data.cache`: they are there at the next call with the
    same text, tokenizer and settings, in this process or another.

    A source without held-out documents is divided by documents, about `data.held_out_share` of them at random; one
    with a single document, or with documents of more than 16 Mi characters, by parts of them. Raises ValueError, naming
    file and place, for text that cannot be read, and if there is too little of it for a row of either split.
    """
    data = config.data
    special = SpecialTokens.of(tokenizer, data.bos)
    settings = {
        "format": FORMAT,
        "tokenizer": tokenizer_digest(tokenizer),
        "text_field": data.text_field,
        "row_tokens": data.row_tokens,
        "bos": data.bos,
    }
    try:
        held_out = open_source(data.source, "held_out", data.text_field)
    except NoHeldOutSplit:
        source: Source = open_source(data.source, "train", data.text_field)
        names: tuple[Split, ...] = ("train", "held_out")
        most = data.max_tokens
        settings |= {"held_out_share": data.held_out_share, "seed": config.seed}
    else:
        source = held_out if split == "held_out" else open_source(data.source, "train", data.text_field)
        names = (split,)
        most = max(data.held_out_tokens, data.row_tokens) if split == "held_out" else data.max_tokens
    settings |= {"splits": names, "max_tokens": most, "source": source.fingerprint}
    store = TokenStore(_directory(config), settings)
    rows = store.find(source.unchanged)
    if rows is None:
        rows = store.add(lambda directory: _tokenize(config, tokenizer, special, source, names, most, directory))
    return rows[split]


def token_rows(
    tokenizer: Any, documents: Iterable[str], row_tokens: int, *, max_tokens: int | None = None, bos: BOS = "row"
) -> Tensor:
    """Documents one after another as int32 rows [R, S], in memory; `bos` as in `DataConfig`.

    What is left over behind the last whole row is dropped. Reading ends with the first `max_tokens` tokens.
    Raises ValueError if there is no document or too little text for one row.
    """
    out = BytesIO()
    writer = RowWriter(out, SpecialTokens.of(tokenizer, bos), row_tokens)
    found = (passage for document in documents for passage in passages([document]))
    write_rows(tokenizer, _all(grouped(found)), [writer], max_tokens)
    stored = writer.stored()
    return with_facts(torch.frombuffer(out.getbuffer(), dtype=torch.int32).view(-1, row_tokens), stored)


def write_rows(
    tokenizer: Any, groups: Iterable[tuple[Group, list[bool]]], writers: list[RowWriter], max_tokens: int | None
) -> bool:
    """Write each passage to the first of `writers`, or, where its group says so, to the second, as far as the first
    `max_tokens` tokens of both go. Returns whether all text was read.
    """
    most = None if max_tokens is None else max_tokens // writers[0].row_tokens
    seen = 0
    last = [-1] * len(writers)
    for group, held_out in groups:
        current = -1
        for number, ids in token_ids(tokenizer, group):
            room = None if most is None else most - sum(writer.rows for writer in writers)
            if room == 0:
                return False
            side, place = int(held_out[number]), seen + number
            follows = bool(group[number].before) and last[side] == place - 1
            writers[side].add(ids, new_document=number != current and not follows, most_rows=room)
            current, last[side] = number, place
        seen += len(group)
    return True


def _directory(config: TrainConfig) -> Path:
    if config.data.cache is not None:
        return Path(config.data.cache).expanduser()
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "sparseclt" / "tokens"


def _tokenize(
    config: TrainConfig,
    tokenizer: Any,
    special: SpecialTokens,
    source: Source,
    names: tuple[Split, ...],
    most: int | None,
    directory: Path,
) -> Entry:
    from tqdm import tqdm

    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(
                total=source.size, desc="tokenize", unit="B", unit_scale=True, delay=BAR_AFTER,
                disable=not config.logging.progress,
            )
        )  # fmt: skip
        files = [stack.enter_context((directory / name).open("wb")) for name in names]
        writers = [RowWriter(file, special, config.data.row_tokens) for file in files]
        groups = grouped(source.passages(bar.update))
        parts = divided(groups, config.data.held_out_share, config.seed) if len(names) > 1 else _all(groups)
        exhausted = write_rows(tokenizer, parts, writers, most)
    splits: dict[str, Stored] = {name: writer.stored(name) for name, writer in zip(names, writers, strict=True)}
    return Entry(splits, source.records(), exhausted)


def _all(groups: Iterable[Group]) -> Iterator[tuple[Group, list[bool]]]:
    return ((group, [False] * len(group)) for group in groups)
