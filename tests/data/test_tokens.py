"""Rows of tokens: where special tokens stand, tokens that cuts do not change, digests and vocabularies."""

import numpy as np
import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sparseclt.data import held_out, tokens
from sparseclt.data.documents import Passage, passages
from sparseclt.data.text import token_rows
from sparseclt.data.tokens import check_token_ids, rows_digest, token_ids


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


def test_every_row_begins_with_bos_and_documents_are_parted(tokenizer):
    rows = token_rows(tokenizer, ["w1 w2", "w3 w4 w5 w6 w7", "w8"], 4)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [[0, 1, 2, 0], [0, 3, 4, 5], [0, 6, 7, 0]]  # 8 is left over


def test_bos_before_documents_only(tokenizer):
    rows = token_rows(tokenizer, ["w1 w2", "w3 w4 w5 w6", "w7"], 4, bos="document")
    assert rows.tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]  # 0 7 are left over


def test_no_special_tokens_at_all(tokenizer):
    assert token_rows(tokenizer, ["w1 w2", "w3 w4 w5", "w6"], 3, bos="none").tolist() == [[1, 2, 3], [4, 5, 6]]


def test_bos_and_eos_each_in_its_place(tokenizer):
    both = tiny_models.tokenizer()
    both.bos_token, both.eos_token = "w8", "w9"
    assert token_rows(both, ["w1", "w2 w3"], 3).tolist() == [[8, 1, 9], [8, 2, 3]]
    assert token_rows(both, ["w1", "w2"], 4, bos="document").tolist() == [[8, 1, 8, 2]]
    both.bos_token = None
    assert token_rows(both, ["w1", "w2 w3"], 3).tolist() == [[9, 1, 9], [9, 2, 3]]
    both.bos_token, both.eos_token = "w8", None
    assert token_rows(both, ["w1", "w2 w3"], 3).tolist() == [[8, 1, 8], [8, 2, 3]]


@pytest.mark.parametrize("bos", ["row", "document"])
def test_a_tokenizer_without_bos_and_eos_needs_none(bos):
    without = tiny_models.tokenizer()
    without.bos_token = without.eos_token = None
    with pytest.raises(ValueError, match=f"data.bos: expected 'none' for a tokenizer with neither .*, got '{bos}'"):
        token_rows(without, ["w1 w2"], 3, bos=bos)
    assert token_rows(without, ["w1 w2"], 2, bos="none").tolist() == [[1, 2]]


def test_no_more_is_read_than_max_tokens_needs(tokenizer):
    read = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield "w1 w2 w3"

    assert token_rows(tokenizer, documents(), 4, max_tokens=11).tolist() == [[0, 1, 2, 3]] * 2
    assert len(read) < 100


def test_rows_do_not_depend_on_how_much_is_tokenized_at_once(tokenizer, monkeypatch):
    documents = [" ".join(f"w{1 + (i * j) % 49}" for j in range(i)) for i in range(1, 30)]
    expected = token_rows(tokenizer, documents, 5)
    monkeypatch.setattr(held_out, "GROUP", 7)
    monkeypatch.setattr(tokens, "PIECE", 20)
    monkeypatch.setattr(tokens, "BATCH", 50)
    assert torch.equal(token_rows(tokenizer, documents, 5), expected) and len(expected) > 100


def test_too_little_text_is_refused_with_its_size(tokenizer):
    for documents, found in ([], 0), (["w1 w2"], 2):
        with pytest.raises(ValueError, match=f"text for at least one row of 4 tokens, got {found} tokens"):
            token_rows(tokenizer, documents, 4)
    with pytest.raises(ValueError, match="data.row_tokens: expected at least 2 tokens, got 1"):
        token_rows(tokenizer, ["w1 w2"], 1)


LINES = "".join(f"Line {i}, and  some words…\n" + "\n" * (i % 3) + "  indented\t" * (i % 2) for i in range(400))
HARD = {
    "lines": LINES,
    "spaces": "one two  three " * 300,
    "no place to cut": "äöü" * 2000,
    "line ends": "\n" * 900 + "x" + " " * 900 + "\r\n" * 900,
    "long words": ("a" * 150 + " ") * 30,
}


def bpe(pre_tokenizer, decoder, normalizer=None, used=True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(byte_fallback=True))
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(decoder, decoders.ByteLevel) else sorted(set(LINES))
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([LINES], trainer)
    if not used:
        backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=backend)


FAMILIES = {
    "GPT-2": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()),
    "with a space before": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
    "Llama 2": lambda: bpe(  # its tokens never reach across words, which nothing but its vocabulary says
        pre_tokenizers.Sequence([
            pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split("▁", "merged_with_next"),
        ]),
        decoders.Metaspace(),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        used=False,
    ),
    "Metaspace": lambda: bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", HARD)
def test_a_text_has_the_same_tokens_in_pieces_as_whole(family, kind, monkeypatch):
    tokenizer = FAMILIES[family]()
    text = HARD[kind]
    monkeypatch.setattr(tokens, "PIECE", 100)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    cut = np.concatenate([ids for _, ids in token_ids(tokenizer, passages([text]))]).tolist()
    assert cut == whole


def test_parts_of_a_document_are_tokenized_with_what_stands_before_them():
    tokenizer = FAMILIES["Llama 2"]()
    whole = tokenizer("some words", add_special_tokens=False)["input_ids"]
    parts = [Passage("some"), Passage(" words", before="some")]
    assert np.concatenate([ids for _, ids in token_ids(tokenizer, parts)]).tolist() == whole


def test_slow_tokenizers_are_used_as_they_are(tokenizer):
    class Slow:
        bos_token_id, eos_token_id, is_fast = 0, 0, False

        def __call__(self, texts, **options):
            return tokenizer(texts, **options)

    assert torch.equal(token_rows(Slow(), ["w1 w2", "w3"], 2), token_rows(tokenizer, ["w1 w2", "w3"], 2))


def test_the_digest_is_of_the_ids_and_their_shape(tokenizer):
    rows = token_rows(tokenizer, ["w1 w2 w3 w4 w5 w6"], 3)
    assert rows_digest(rows) == rows_digest(rows.clone()) == rows_digest(rows.long())
    assert len({rows_digest(other) for other in (rows, rows[:2], rows.view(1, -1), rows + 1)}) == 4
    before = rows_digest(rows)
    rows[0, 1] = 7
    assert rows_digest(rows) == rows_digest(rows.clone()) != before


def test_large_rows_are_hashed_a_part_at_a_time(monkeypatch):
    rows = torch.arange(300, dtype=torch.int32).view(100, 3)
    expected = rows_digest(rows)
    monkeypatch.setattr(tokens, "HASHED", 40)
    assert rows_digest(rows) == expected


def test_a_token_beyond_the_vocabulary_is_named(tokenizer):
    rows = token_rows(tokenizer, ["w1 w49 w3"], 4)
    for given in (rows, rows.clone()):
        check_token_ids(given, 50, tokenizer)
        with pytest.raises(ValueError, match=r"rows: expected token ids of 0 to 48 \(.*\), got 49 \('w49'\); use the"):
            check_token_ids(given, 49, tokenizer)
    with pytest.raises(ValueError, match="rows: expected token ids of 0 to 49 .*, got -1; use the"):
        check_token_ids(torch.tensor([[1, -1]]), 50)
