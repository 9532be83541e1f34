"""Where text comes from: the package, files, directories of files, data sets of the Hugging Face hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from sparseclt.data.documents import Passage, passages
from sparseclt.data.files import Advance, FileReader, kind, read_file, same_text, text_of
from sparseclt.language_model.files import looks_like_path

Split = Literal["train", "held_out"]
HUB_NAMES: dict[Split, list[str]] = {"train": ["train"], "held_out": ["held_out", "validation", "test"]}
EXPECTED = "'embedded', an existing file or directory, or a data set on the Hugging Face hub"
KINDS = "a .txt, .jsonl or .json file (or .gz or .zst of these) or a .parquet file"


class NoHeldOutSplit(LookupError):
    """The source has no held-out documents of its own."""


class Source(Protocol):
    """Documents in a fixed order, with what tells them from others."""

    @property
    def fingerprint(self) -> str:
        """Of what is read, so far as it is known without reading it."""

    @property
    def size(self) -> int | None:
        """Bytes to read, where that is known."""

    def passages(self, advance: Advance = ...) -> Iterator[Passage]:
        """All documents, from the first; `advance` is told how many more bytes have been read."""

    def records(self) -> list[dict[str, Any]]:
        """Of what the last `passages` has read."""

    def unchanged(self, records: list[dict[str, Any]], exhausted: bool) -> bool:
        """Whether `passages` would read the same as when it left `records` (`exhausted`: read to the end)."""


class Files:
    """Documents of local files, one file after another."""

    fingerprint = ""  # the digests of the bytes that were read say all

    def __init__(self, files: list[Path], text_field: str):
        for file in files:
            if not kind(file):
                raise ValueError(f"data.source: expected {KINDS}, got {str(file)!r}")
        self.files, self.text_field = files, text_field
        self.size = sum(file.stat().st_size for file in files)
        self._readers: list[FileReader] = []

    def passages(self, advance: Advance = lambda count: None) -> Iterator[Passage]:
        self._readers = []
        for file in self.files:
            try:
                reader = FileReader(file, advance)
            except OSError as error:
                raise ValueError(f"data.source: could not open {file}: {error.strerror}") from error
            self._readers.append(reader)
            with reader:
                yield from read_file(reader, self.text_field)

    def records(self) -> list[dict[str, Any]]:
        return [reader.record() for reader in self._readers]

    def unchanged(self, records: list[dict[str, Any]], exhausted: bool) -> bool:
        if len(records) > len(self.files) or exhausted and len(records) != len(self.files):
            return False
        return all(same_text(file, record) for file, record in zip(self.files, records, strict=False))


class HubSplit:
    """One split of a data set on the hub, streamed."""

    size = None

    def __init__(self, name: str, builder: Any, split: str, text_field: str):
        self.name, self.builder, self.split, self.text_field = name, builder, split, text_field
        # The hash follows the revision on the hub, or the files of a local data set and when they were changed.
        self.fingerprint = f"{name}:{builder.config_id}:{builder.hash}:{split}"

    def passages(self, advance: Advance = lambda count: None) -> Iterator[Passage]:
        import datasets

        number, records = 0, iter(self.builder.as_streaming_dataset(self.split))
        while True:
            number += 1
            where = f"{self.name}, {self.split}, record {number}"
            try:
                record = next(records)
            except StopIteration:
                return
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise ValueError(f"data.source: could not read {where}: {error}") from error
            text = text_of(record, self.text_field, where)
            yield from passages([text])
            advance(len(text))

    def records(self) -> list[dict[str, Any]]:
        return []

    def unchanged(self, records: list[dict[str, Any]], exhausted: bool) -> bool:
        return not records


def open_source(source: str, split: Split, text_field: str = "text") -> Source:
    """The documents of one split of a source; those without any text are left out.

    `source`: "embedded"; a .txt (one document), .jsonl or .json file, or one of these compressed (.gz, .zst); a
    .parquet file; a directory of such files (but .json), in order of name, where files named `held_out`
    (held_out.jsonl.gz) are the held-out split; or "hf:NAME", "hf:NAME:CONFIG" or NAME for a data set of the hub,
    streamed, where the held-out split is called held_out, validation or test. JSON holds strings, or objects with the
    text under `text_field`, which is also the column of a Parquet file or a data set.

    Raises ValueError for a source that does not exist or has no text, NoHeldOutSplit if "held_out" is asked
    for and there is none.
    """
    if split not in HUB_NAMES:
        raise ValueError(f"split: expected 'train' or 'held_out', got {split!r}")
    if source == "embedded":
        from sparseclt import embedded

        return Files([embedded.corpus(split)], text_field)
    path = Path(source).expanduser()
    if path.exists():
        return Files(_local_files(path, split), text_field)
    if not source.startswith("hf:") and looks_like_path(source.partition(":")[0]):
        raise ValueError(f"data.source: expected {EXPECTED}, got {source!r}, which does not exist")
    return _open_hub(source.removeprefix("hf:"), split, text_field)


def _local_files(path: Path, split: Split) -> list[Path]:
    if not path.is_dir():
        if split == "held_out":
            raise NoHeldOutSplit(f"data.source: {str(path)!r} is one file, without a held-out split")
        return [path]
    # Directories of models and of runs hold .json files that are no text.
    files = [f for f in sorted(path.iterdir()) if kind(f) and not kind(f).startswith(".json.") and f.suffix != ".json"]
    if not files:
        raise ValueError(
            f"data.source: expected .txt, .jsonl (or .gz or .zst of these) or .parquet files, got none in {str(path)!r}"
        )
    held_out = [f for f in files if f.name.split(".")[0] == "held_out"]
    if split == "held_out" and not held_out:
        raise NoHeldOutSplit(f"data.source: {str(path)!r} has no file named held_out")
    if len(held_out) == len(files) and split == "train":
        raise ValueError(f"data.source: expected files to train on, got only held_out in {str(path)!r}")
    return [f for f in files if (f in held_out) == (split == "held_out")]


def _open_hub(name: str, split: Split, text_field: str) -> HubSplit:
    import datasets

    path, _, config = name.partition(":")
    try:
        builder = datasets.load_dataset_builder(path, config or None)
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
    return HubSplit(name, builder, chosen[0], text_field)
