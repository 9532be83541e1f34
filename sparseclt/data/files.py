"""Text files: plain, JSON, JSON lines and Parquet, compressed or not, read a little at a time.

Every error is a ValueError that names the file and the place in it.
"""

import codecs
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparseclt.data.documents import Passage, passages

COMPRESSED = (".gz", ".zst")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
CHUNK = 1 << 20  # bytes
RECORDS = 64  # of a Parquet file at a time
Advance = Callable[[int], object]  # told how many more bytes of the files have been read


def kind(file: Path) -> str:
    """How a file is read: ".txt", ".jsonl.gz", ... Empty if it is none that we read."""
    compressed = file.suffix if file.suffix in COMPRESSED else ""
    plain = Path(file.name.removesuffix(compressed)).suffix
    return plain + compressed if plain in SUFFIXES and not (plain == ".parquet" and compressed) else ""


class FileReader(io.RawIOBase):
    """The bytes of a file, with the number and the digest of those that were read."""

    def __init__(self, file: Path, advance: Advance = lambda count: None):
        self.file, self.advance = file, advance
        self.raw = file.open("rb", buffering=0)
        self.size = file.stat().st_size
        self.bytes, self.hash = 0, hashlib.blake2b()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.raw.readinto(buffer) or 0
        self.hash.update(memoryview(buffer)[:count])
        self.bytes += count
        self.advance(count)
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()

    def record(self) -> dict[str, Any]:
        """What was read of the file: `same_text` tells whether a file still has it."""
        whole = self.bytes >= self.size
        return {"kind": kind(self.file), "bytes": self.bytes, "whole": whole, "blake2b": self.hash.hexdigest()}


def same_text(file: Path, record: dict[str, Any]) -> bool:
    """Whether a file begins with the bytes that `record` is of, and ends with them if it was read to its end."""
    size = file.stat().st_size
    if kind(file) != record["kind"] or size < record["bytes"] or record["whole"] and size != record["bytes"]:
        return False
    digest, left = hashlib.blake2b(), record["bytes"]
    with file.open("rb") as stream:
        while left and (chunk := stream.read(min(CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
    return digest.hexdigest() == record["blake2b"]


def read_file(reader: FileReader, text_field: str) -> Iterator[Passage]:
    """The passages of all documents in a file; documents without text are left out."""
    file, how = reader.file, kind(reader.file)
    try:
        if how == ".parquet":
            yield from _parquet(reader, text_field)
        elif how.startswith(".txt"):
            yield from passages(_decoded(_open(reader), file))
        elif how.startswith(".jsonl"):
            yield from _json_lines(_open(reader), file, text_field)
        else:
            yield from _json(_open(reader), file, text_field)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"data.source: could not read {file} beyond byte {reader.bytes}, it is damaged or cut short: "
            f"{_one_line(error)}"
        ) from error


def text_of(record: Any, text_field: str, where: str) -> str:
    """The text of a record: itself, or its `text_field`."""
    if isinstance(record, dict):
        if text_field not in record:
            found = sorted(map(str, record))
            raise ValueError(f"data.text_field: expected one of the fields {found} of {where}, got {text_field!r}")
        if not isinstance(record[text_field], str):
            raise ValueError(
                f"data.text_field: expected a field of text, but {text_field!r} in {where} is "
                f"{type(record[text_field]).__name__}"
            )
        record = record[text_field]
    if not isinstance(record, str):
        raise ValueError(f"data.source: expected text or an object in {where}, got {type(record).__name__}")
    try:
        record.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"data.source: expected text in {where}, but its character {error.start} is half of a surrogate pair"
        ) from error
    return record


def _open(reader: FileReader) -> BinaryIO:
    raw = io.BufferedReader(reader, CHUNK)
    if reader.file.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if reader.file.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"), CHUNK)
    return raw


def _decoded(stream: BinaryIO, file: Path) -> Iterator[str]:
    """UTF-8 text, a chunk at a time, as it stands in the file but for a byte order mark at the beginning."""
    decoder, place = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        chunk = stream.read(CHUNK)
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, f"byte {place - waiting + error.start} of {file}") from error
        yield text if place else text.removeprefix("\ufeff")
        if not chunk:
            return
        place += len(chunk)


def _not_utf8(error: UnicodeDecodeError, where: str) -> ValueError:
    return ValueError(
        f"data.source: expected UTF-8, got 0x{error.object[error.start]:02x} ({error.reason}) at {where}; convert it"
    )


def _json_lines(stream: BinaryIO, file: Path, text_field: str) -> Iterator[Passage]:
    for number, line in enumerate(stream, 1):
        where = f"{file}, line {number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _not_utf8(error, f"byte {error.start} of {where}") from error
        if number == 1:
            text = text.removeprefix("\ufeff")
        if text.strip():
            yield from passages([text_of(_parse(text, where), text_field, where)])


def _json(stream: BinaryIO, file: Path, text_field: str) -> Iterator[Passage]:
    records = _parse("".join(_decoded(stream, file)), str(file))
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield from passages([text_of(record, text_field, f"{file}, record {number}")])


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"data.source: expected JSON in {where}: {error}") from error


def _parquet(reader: FileReader, text_field: str) -> Iterator[Passage]:
    import pyarrow
    from pyarrow import parquet

    file, number = reader.file, 0
    advance, reader.advance = reader.advance, lambda count: None  # the bar follows the records, not the digest
    while reader.read(CHUNK):  # a Parquet file is not read from front to back: all of it counts
        pass
    try:
        table = parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK, page_checksum_verification=True)
        if text_field in table.schema_arrow.names:
            for batch in table.iter_batches(RECORDS, columns=[text_field], use_threads=False):
                for record in batch.to_pylist():
                    number += 1
                    yield from passages([text_of(record, text_field, f"{file}, record {number}")])
                advance(reader.size * len(batch) // table.metadata.num_rows)
            return
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"data.source: expected a whole Parquet file, got {file} (record {number}): {_one_line(error)}"
        ) from error
    raise ValueError(
        f"data.text_field: expected one of the fields {sorted(table.schema_arrow.names)} of {file}, got {text_field!r}"
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
