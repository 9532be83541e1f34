"""Held-out text: whole documents, at random but always the same, and never a piece of the other side."""

import re

import pytest
import tiny_models
from texts import write, write_jsonl

from sparseclt.config import DataConfig, TrainConfig
from sparseclt.data import documents
from sparseclt.data.documents import Passage
from sparseclt.data.held_out import GROUP, divided, grouped
from sparseclt.data.text import load_rows

SPLITS = ("train", "held_out")


def numbered(count: int) -> list[Passage]:
    return [Passage(f"document {i} ") for i in range(count)]


def held_out(passages, share=0.05, seed=0) -> list[str]:
    parts = divided(grouped(passages), share, seed)
    return [passage.text for group, held in parts for passage, out in zip(group, held, strict=True) if out]


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("count", [2, 3, 20, GROUP, GROUP + 1, 1000])
def test_about_a_share_of_the_documents_is_held_out(share, count):
    found = len(held_out(numbered(count), share))
    assert 1 <= found < count and (abs(found - share * count) <= 1 or found == 1)


def test_the_choice_is_random_and_depends_on_the_seed_alone():
    found = held_out(numbered(1000), 0.1, seed=1)
    assert found == held_out(iter(numbered(1000)), 0.1, seed=1)
    assert found != held_out(numbered(1000), 0.1, seed=2)
    places = [int(text.split()[1]) % GROUP for text in found]
    assert len(set(places)) > 30
    # What comes later does not change what was chosen before.
    assert held_out(numbered(2000), 0.1, seed=1)[: len(found) - GROUP] == found[: len(found) - GROUP]


def test_groups_are_bounded_by_characters_too(monkeypatch):
    monkeypatch.setattr("sparseclt.data.held_out.LONGEST", 50)
    assert [len(group) for group in grouped([Passage("x" * 60), Passage("y" * 60), Passage("z")] * 2)] == [2, 2, 2]
    assert len(held_out([Passage("x" * 60)] * 9, 0.3)) == 3


def rows(source, **settings):
    """Both splits of a source as lists of token ids, without special tokens."""
    data = DataConfig(str(source), **{"row_tokens": 4, "held_out_share": 0.3, "bos": "none", **settings})
    return [load_rows(TrainConfig(data=data), tiny_models.tokenizer(), split).flatten().tolist() for split in SPLITS]


def test_a_source_is_split_by_documents(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [f"w{i} " * 8 for i in range(1, 31)])
    train, out = rows(path)
    assert len(train) == 21 * 8 and len(out) == 9 * 8 and not set(train) & set(out)


def test_a_single_document_gives_one_stretch_of_it(tmp_path):
    words = [f"w{1 + i // 20}" for i in range(900)]
    train, out = rows(write(tmp_path / "a.txt", " ".join(words)), held_out_share=0.1)
    assert 60 <= len(out) <= 120 and len(train) + len(out) >= 890
    assert len(set(train) & set(out)) <= 2  # the words on both sides of the cuts


def test_a_very_long_document_is_split_by_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 1000)
    monkeypatch.setattr(documents, "PART", 100)
    words = [f"w{1 + i // 100}" for i in range(4900)]
    train, out = rows(write(tmp_path / "a.txt", " ".join(words)))
    assert 0.27 < len(out) / 4900 < 0.33 and len(train) + len(out) > 4880
    assert out == sorted(out) and len(set(out)) > 30


def test_parts_that_follow_one_another_are_not_parted(tmp_path):
    path = write(tmp_path / "a.txt", " ".join(f"w{1 + i % 49}" for i in range(900)))
    for bos, most in (("document", 3), ("row", 3 + 300)):
        both = rows(path, bos=bos)
        assert sum(ids.count(0) for ids in both) <= most
    assert rows(path, bos="none")[0].count(0) == 0


def test_what_cannot_be_divided_is_refused(tmp_path):
    for text, message in (
        ("w", "expected at least two documents, to hold one out"),
        ("w1 w2 w3 w4 w5 w6 w7 w8", "expected held-out text for at least one row of 4 tokens, got [0-3] tokens"),
        (" \n", "expected text for at least one row of 4 tokens, got 0 tokens"),
    ):
        with pytest.raises(ValueError, match=f"data.source: {message}") as error:
            rows(write(tmp_path / "a.txt", text))
        assert not re.search("\n", str(error.value))


def test_the_embedded_text_keeps_its_own_held_out_documents():
    data = DataConfig(max_tokens=1280, held_out_tokens=1280)
    texts = [load_rows(TrainConfig(data=data, seed=seed), tiny_models.tokenizer(), "held_out") for seed in (0, 1)]
    assert texts[0].equal(texts[1]) and texts[0].shape == (10, 128)
