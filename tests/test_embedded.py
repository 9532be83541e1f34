"""The embedded model and corpus match the figures of their build."""

import gzip
import json

import build_embedded as build
import pytest
import torch

from sparseclt import embedded
from sparseclt.language_model.language_model import LanguageModel


def test_it_is_small_and_good_enough():
    figures = embedded.build_figures()
    data = embedded.model_directory().parent
    shipped = sum(f.stat().st_size for f in data.rglob("*") if f.is_file())
    assert shipped <= 5_000_000 and figures["steps"] == build.STEPS
    assert figures["held_out_bits_per_byte"] <= 1.6


def held_out() -> list[str]:
    with gzip.open(embedded.corpus("held_out"), "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def test_no_held_out_document_is_among_the_training_documents():
    with gzip.open(embedded.corpus("train"), "rt") as lines:
        train = {json.loads(line)["text"] for line in lines}
    assert train and len(held_out()) == embedded.build_figures()["held_out_documents"]
    assert not train & set(held_out())


def test_the_shipped_model_has_the_bits_per_byte_that_the_script_printed():
    """On the first held-out documents: an estimate, near enough to tell a damaged or mixed-up model."""
    model = LanguageModel.load("embedded")
    texts = held_out()[:3]
    ids = build.pack(model.tokenizer, texts)
    measured = build.bits_per_byte(model.bridge.original_model, ids, sum(len(t.encode()) for t in texts))
    assert measured == pytest.approx(embedded.build_figures()["held_out_bits_per_byte"], abs=0.15)


def test_training_the_model_is_repeatable(capsys):
    ids = torch.randint(0, build.VOCAB, (600,), generator=torch.Generator().manual_seed(0))
    first, second = build.train_model(ids, steps=2), build.train_model(ids, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_tokenizer_is_repeatable_and_lossless():
    texts = ["The state of the Union is strong. " * 30, "Fellow citizens of the Senate and House. " * 30]
    first, second = build.train_tokenizer(texts), build.train_tokenizer(texts)
    assert first.get_vocab() == second.get_vocab()
    assert first.decode(first("Né à Paris, 1790 — ok?")["input_ids"]) == "Né à Paris, 1790 — ok?"
