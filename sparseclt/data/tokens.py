"""From passages of text to rows of token ids, in memory that does not grow with the text."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparseclt.data.documents import Passage, cut

Ids = npt.NDArray[np.int32]
BOS = Literal["row", "document", "none"]
PIECE = 32 << 10  # characters handed to the tokenizer in one piece
BATCH = 1 << 20  # characters handed to it at once: it works on several pieces in parallel
HASHED = 16 << 20  # bytes of rows that are hashed at once


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens put between the tokens of the text."""

    row: int | None = None
    """Begins every row."""
    first: int | None = None
    """Begins the first document."""
    between: int | None = None
    """Stands between two documents, unless a row begins there anyway."""

    @classmethod
    def of(cls, tokenizer: Any, bos: BOS) -> "SpecialTokens":
        """Those that `data.bos` asks for. Raises ValueError if the tokenizer has neither a BOS nor an EOS token."""
        if bos == "none":
            return cls()
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        if begin is None and end is None:
            raise ValueError(
                f"data.bos: expected 'none' for a tokenizer with neither a BOS nor an EOS token, got {bos!r}"
            )
        start: int = end if begin is None else begin
        if bos == "document":
            return cls(first=start, between=start)
        return cls(row=start, between=start if end is None else end)


class RowWriter:
    """Rows of S token ids, written to `out` as they fill up; what does not fill a row at the end is left out."""

    def __init__(self, out: BinaryIO, special: SpecialTokens, row_tokens: int):
        if row_tokens < 2:
            raise ValueError(f"data.row_tokens: expected at least 2 tokens, got {row_tokens}")
        self.out, self.special, self.row_tokens = out, special, row_tokens
        self.rows = self.documents = 0
        self.largest = -1
        self.hash = hashlib.blake2b()
        self.rest: Ids = np.empty(0, np.int32)

    def add(self, ids: Ids, *, new_document: bool, most_rows: int | None = None) -> None:
        """Add tokens of the next document, or more of the current one, and at most `most_rows` rows."""
        if new_document:
            parted = self.special.row is not None and not len(self.rest)
            token = None if parted else self.special.between if self.documents else self.special.first
            self.documents += 1
            ids = ids if token is None else np.concatenate([np.array([token], np.int32), ids])
        self.rest = np.concatenate([self.rest, ids])
        begin = self.special.row
        begun = begin is not None
        width = self.row_tokens - begun
        rows = len(self.rest) // width
        if most_rows is not None:
            rows = min(rows, most_rows)
        if not rows:
            return
        block = np.empty((rows, self.row_tokens), np.int32)
        block[:, begun:] = self.rest[: rows * width].reshape(rows, width)
        if begin is not None:
            block[:, 0] = begin
        self.rest = self.rest[rows * width :]
        self.rows += rows
        self.largest = max(self.largest, int(block.max()))
        self.hash.update(block.data)
        self.out.write(block.data)

    def stored(self, split: str = "train") -> "Stored":
        """Facts about what was written. Raises ValueError if that is not a single row."""
        if not self.rows:
            what, more = ("text", "") if split == "train" else ("held-out text", ", a larger data.held_out_share")
            raise ValueError(
                f"data.source: expected {what} for at least one row of {self.row_tokens} tokens, got "
                f"{len(self.rest)} tokens; give more text{more} or a smaller data.row_tokens"
            )
        return Stored(self.rows, finish_digest(self.hash, self.rows, self.row_tokens), self.largest)


@dataclass(frozen=True)
class Stored:
    """Facts about rows of tokens that are known without reading them."""

    rows: int
    digest: str
    largest: int
    """The largest token id."""


def token_ids(tokenizer: Any, passages: Iterable[Passage]) -> Iterator[tuple[int, Ids]]:
    """The tokens of passages, without special ones, a part of a passage at a time, each with the passage's number.

    They are those that the tokenizer gives for a whole document: passages are cut, and tokenized with what stands
    before them, only where tokens end. Fast tokenizers work on many parts at once, on all cores.
    """
    batch: list[tuple[int, list[Passage]]] = []
    characters = 0
    for number, passage in enumerate(passages):
        for part in _of_batch_size(passage):
            batch.append((number, cut(part.text, PIECE, part.before)))
            characters += len(part.text)
            if characters >= BATCH:
                yield from _encode(tokenizer, batch)
                batch, characters = [], 0
    yield from _encode(tokenizer, batch)


def _of_batch_size(passage: Passage) -> list[Passage]:
    return [passage] if len(passage.text) <= BATCH else cut(passage.text, BATCH, passage.before)


def _encode(tokenizer: Any, batch: list[tuple[int, list[Passage]]]) -> Iterator[tuple[int, Ids]]:
    pieces = [piece for _, parts in batch for piece in parts]
    encoded = iter(_without_context(tokenizer, pieces))
    for number, parts in batch:
        ids = [next(encoded) for _ in parts]
        while any(found is None for found in ids[1:]):
            parts = _joined(parts, ids)  # without the cuts that tokens reach across
            ids = _without_context(tokenizer, parts)
        if ids[0] is None:  # What stands before is written already: a token ends there, come what may.
            ids[0] = np.array(_batch_ids(tokenizer, [parts[0].text])[0], np.int32)
        yield number, np.concatenate(ids)  # type: ignore[arg-type]


def _joined(parts: list[Passage], ids: list[Ids | None]) -> list[Passage]:
    joined = parts[:1]
    for part, found in zip(parts[1:], ids[1:], strict=True):
        if found is None:
            joined[-1] = Passage(joined[-1].text + part.text, joined[-1].before)
        else:
            joined.append(part)
    return joined


def _without_context(tokenizer: Any, pieces: list[Passage]) -> list[Ids | None]:
    """The tokens of each piece behind what stands before it; None where no token ends between the two."""
    texts = [piece.before + piece.text for piece in pieces]
    befores = {piece.before for piece in pieces if piece.before}
    known = dict(zip(befores, _batch_ids(tokenizer, list(befores)), strict=True)) | {"": []}
    found: list[Ids | None] = []
    for piece, ids in zip(pieces, _batch_ids(tokenizer, texts), strict=True):
        before = known[piece.before]
        found.append(np.array(ids[len(before) :], np.int32) if ids[: len(before)] == before else None)
    return found


def _batch_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", False):
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # Without the offsets and masks that the tokenizer itself would return: half the time.
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def rows_digest(rows: Tensor) -> str:
    """blake2b of token ids [R, S] as int32 and of their shape, in hexadecimal; `load_rows` gives it with the rows."""
    if (stored := stored_facts(rows)) is not None:
        return stored.digest
    digest = hashlib.blake2b()
    for part in _parts(rows):
        digest.update(part.int().cpu().contiguous().numpy().data)
    return finish_digest(digest, *rows.shape)


def check_token_ids(rows: Tensor, vocabulary: int, tokenizer: Any = None) -> None:
    """Raise ValueError, naming the token, if an id of rows [R, S] is not among a model's 0 to `vocabulary` - 1."""
    stored = stored_facts(rows)
    largest = max(int(part.max()) for part in _parts(rows)) if stored is None else stored.largest
    smallest = min(int(part.min()) for part in _parts(rows)) if stored is None else 0
    wrong = largest if largest >= vocabulary else smallest
    if 0 <= wrong < vocabulary:
        return
    name = f" ({tokenizer.convert_ids_to_tokens(wrong)!r})" if tokenizer is not None and wrong >= 0 else ""
    raise ValueError(
        f"rows: expected token ids of 0 to {vocabulary - 1} (the model's vocabulary), got {wrong}{name}; use the "
        f"tokenizer that belongs to the model"
    )


def with_facts(rows: Tensor, stored: Stored) -> Tensor:
    """`rows`, which from now on have `stored_facts`."""
    rows.stored_facts = stored, rows._version  # type: ignore[attr-defined]
    return rows


def stored_facts(rows: Tensor) -> Stored | None:
    """What `with_facts` has said about `rows`, unless they were changed since."""
    stored, version = getattr(rows, "stored_facts", (None, None))
    return stored if version == rows._version else None


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, HASHED // (4 * max(1, rows.shape[1]))))


def finish_digest(digest: "hashlib.blake2b", rows: int, row_tokens: int) -> str:
    """The digest of rows out of that of their ids."""
    digest = digest.copy()
    digest.update(f"{rows}x{row_tokens}".encode())
    return digest.hexdigest()
