"""Text is tokenized once: found again, checked, and safe against crashes and other processes."""

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from texts import write_jsonl, write_parquet

from sparseclt.config import DataConfig, TrainConfig
from sparseclt.data import text
from sparseclt.data.text import load_rows
from sparseclt.data.tokens import rows_digest

WORDS = [" ".join(f"w{1 + (i * j) % 49}" for j in range(20)) for i in range(40)]


@pytest.fixture
def store(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def tokenized(monkeypatch):
    """How often a text was tokenized."""
    calls = []
    real = text.write_rows
    monkeypatch.setattr(text, "write_rows", lambda *args: calls.append(1) or real(*args))
    return calls


def load(source, store, split="train", tokenizer=None, seed=0, **settings):
    data = DataConfig(str(source), row_tokens=8, held_out_share=0.2, cache=str(store), **settings)
    return load_rows(TrainConfig(data=data, seed=seed), tokenizer or tiny_models.tokenizer(), split)


def write_any(path: Path, texts: list[str]) -> Path:
    return write_parquet(path, texts) if path.suffix == ".parquet" else write_jsonl(path, texts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_the_same_text_is_tokenized_once_for_both_splits(tmp_path, store, tokenized, name):
    first = load(write_any(tmp_path / name, WORDS), store)
    held_out = load(tmp_path / name, store, "held_out")
    again = load(tmp_path / name, store)
    assert len(tokenized) == 1 and torch.equal(first, again) and len(held_out) > 3
    assert first.dtype == torch.int32 and first.shape[1] == 8
    assert rows_digest(again) == rows_digest(first) == rows_digest(first.clone()) != rows_digest(held_out)


def test_a_text_that_was_moved_is_still_known(tmp_path, store, tokenized):
    load(write_jsonl(tmp_path / "a.jsonl", WORDS), store)
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    load(tmp_path / "b.jsonl", store)
    assert len(tokenized) == 1


def test_changed_text_is_tokenized_anew_though_size_and_time_agree(tmp_path, store, tokenized):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)
    before, stat = load(path, store).clone(), path.stat()
    path.write_text(path.read_text().replace("w7", "w8"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    assert not torch.equal(load(path, store), before) and len(tokenized) == 2
    path.write_text(path.read_text() + '"w1 w2"\n')
    load(path, store)
    assert len(tokenized) == 3


def test_a_file_that_was_added_to_a_directory_is_noticed(tmp_path, store, tokenized):
    (tmp_path / "texts").mkdir()
    write_jsonl(tmp_path / "texts" / "b.jsonl", WORDS)
    few = load(tmp_path / "texts", store)
    write_jsonl(tmp_path / "texts" / "c.jsonl", WORDS)
    assert len(load(tmp_path / "texts", store)) > len(few) and len(tokenized) == 2


CHANGES = {
    "data.row_tokens": {"row_tokens": 9}, "data.bos": {"bos": "document"}, "data.max_tokens": {"max_tokens": 64},
    "data.held_out_share": {"held_out_share": 0.4}, "seed": {"seed": 1},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_settings_are_other_rows(tmp_path, store, tokenized, change):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)

    def loaded(row_tokens=8, held_out_share=0.2, seed=0, **rest):
        data = DataConfig(str(path), "text", row_tokens, held_out_share=held_out_share, cache=str(store), **rest)
        return load_rows(TrainConfig(data=data, seed=seed), tiny_models.tokenizer(), "train")

    assert not torch.equal(loaded(), loaded(**change)) and len(tokenized) == 2


def test_another_tokenizer_is_other_rows(tmp_path, store, tokenized):
    other = tiny_models.tokenizer()
    other.bos_token = "w3"
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)
    assert not torch.equal(load(path, store), load(path, store, tokenizer=other)) and len(tokenized) == 2


def test_max_tokens_reads_no_further_and_does_not_mind_what_comes_later(tmp_path, store, tokenized):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS * 3000)
    assert path.stat().st_size > 4 << 20
    splits = [load(path, store, split, max_tokens=800) for split in ("train", "held_out")]
    assert sum(map(len, splits)) == 100
    info = json.loads(next(store.glob("*/tokens.json")).read_bytes())
    assert info["read"][0]["bytes"] <= 2 << 20 and not info["exhausted"]
    path.write_bytes(path.read_bytes() + b"no JSON")
    load(path, store, max_tokens=800)
    assert len(tokenized) == 1


def test_a_hub_data_set_is_read_once(tmp_path, store, tokenized, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", WORDS)
    for _ in range(2):
        first = load(f"hf:{tmp_path / 'set'}", store)
    write_jsonl(tmp_path / "set" / "train.jsonl", WORDS[:20])
    assert len(load(f"hf:{tmp_path / 'set'}", store)) < len(first) and len(tokenized) == 2


@pytest.mark.parametrize("damage", ["byte", "length", "missing", "description", "nesting"])
def test_a_damaged_entry_is_named_and_made_again(tmp_path, store, tokenized, damage):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)
    before = load(path, store).clone()
    file = next(store.glob("*/train"))
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "description":
        (file.parent / "tokens.json").write_text('{"splits": 3}')
    elif damage == "nesting":
        (file.parent / "tokens.json").write_text("[" * 100_000)
    else:
        file.write_bytes(data[:-4] if damage == "length" else data[:40] + bytes([data[40] ^ 1]) + data[41:])
    with pytest.warns(UserWarning, match=f"data.cache: {file.parent} is damaged"):
        again = load(path, store)
    assert torch.equal(again, before) and len(tokenized) == 2
    load(path, store)
    assert len(tokenized) == 2


def test_a_failure_leaves_nothing_behind(tmp_path, store):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)
    path.write_bytes(path.read_bytes() + b"no JSON\n")
    with pytest.raises(ValueError, match="line 41"):
        load(path, store)
    assert list(store.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path, store, monkeypatch):
    def full(*args, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = write_jsonl(tmp_path / "a.jsonl", WORDS)
    monkeypatch.setattr("sparseclt.data.tokens.RowWriter.add", full)
    with pytest.raises(ValueError, match=f"data.cache: could not write token ids to {store} .No space left on device"):
        load(path, store)
    assert list(store.iterdir()) == []


def test_a_text_that_the_disk_refuses_is_not_taken_for_the_store(tmp_path, store, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)

    def refused(*args, **settings):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr("sparseclt.data.tokens.RowWriter.add", refused)
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        load(path, store)
    assert list(store.iterdir()) == []


def test_what_a_killed_process_left_is_removed_after_a_day(tmp_path, store):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)
    for name, age in (("old", 2 * 86_400), ("new", 60)):
        left = store / f".unfinished-{name}"
        left.mkdir(parents=True)
        for file in (left / "train", left):
            if file != left:
                file.write_bytes(b"")
            os.utime(file, (time.time() - age,) * 2)
    load(path, store)
    assert [p.name for p in store.glob(".unfinished-*")] == [".unfinished-new"]


def test_several_at_once_do_no_harm(tmp_path, store):
    path, tokenizer = write_jsonl(tmp_path / "a.jsonl", WORDS), tiny_models.tokenizer()
    found, threads = [], []
    for _ in range(6):
        threads.append(threading.Thread(target=lambda: found.append(load(path, store, tokenizer=tokenizer))))
        threads[-1].start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and all(torch.equal(rows, found[0]) for rows in found)
    assert len(list(store.iterdir())) == 1


def test_rows_stay_readable_when_the_store_is_emptied(tmp_path, store):
    rows = load(write_jsonl(tmp_path / "a.jsonl", WORDS), store)
    before = rows.clone()
    shutil.rmtree(store)
    assert torch.equal(rows, before)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"data.cache: could not write token ids to {tmp_path / 'file'} "):
        load(path, tmp_path / "file")


def test_the_default_place_is_in_the_hugging_face_cache(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", WORDS)
    load_rows(TrainConfig(data=DataConfig(str(path), row_tokens=8)), tiny_models.tokenizer(), "train")
    assert list((Path(os.environ["HF_HOME"]) / "sparseclt" / "tokens").glob("*/train"))
