"""Documents from every kind of source, token rows, and the resumable stream of batches."""

import gzip
import json
from itertools import islice

import pytest
import tiny_models
import torch

from sparseclt.data.text import NoHeldOutSplit, RowStream, read_documents, split_held_out, token_rows


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


def write_jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))


def write_gz(path, text):
    path.write_bytes(gzip.compress(text.encode()))


def test_a_text_file_is_one_document_plain_or_gzipped(tmp_path):
    (tmp_path / "a.txt").write_text("w1 w2\nw3\n")
    write_gz(tmp_path / "a.txt.gz", "w1 w2\nw3\n")
    assert list(read_documents(str(tmp_path / "a.txt"), "train")) == ["w1 w2\nw3\n"]
    assert list(read_documents(str(tmp_path / "a.txt.gz"), "train")) == ["w1 w2\nw3\n"]


def test_json_holds_objects_or_strings_plain_or_gzipped(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"], "body")
    (tmp_path / "b.jsonl").write_text('"one"\n\n"two"\n')
    write_gz(tmp_path / "c.json.gz", json.dumps(["one", {"body": "two"}]))
    for name in ("a.jsonl", "b.jsonl", "c.json.gz"):
        assert list(read_documents(str(tmp_path / name), "train", "body")) == ["one", "two"]


def test_documents_without_text_are_left_out(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", "two"])
    assert list(read_documents(str(tmp_path / "a.jsonl"), "train")) == ["one", "two"]


def test_a_directory_is_read_in_order_of_name_with_its_held_out_file_apart(tmp_path):
    (tmp_path / "b.txt").write_text("third")
    write_gz(tmp_path / "a.jsonl.gz", '"first"\n"second"\n')
    (tmp_path / "held_out.txt").write_text("unseen")
    (tmp_path / "build.json").write_text("{}")
    assert list(read_documents(str(tmp_path), "train")) == ["first", "second", "third"]
    assert list(read_documents(str(tmp_path), "held_out")) == ["unseen"]


def test_sources_without_held_out_documents_say_so(tmp_path):
    (tmp_path / "a.txt").write_text("w1")
    for source in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(NoHeldOutSplit):
            read_documents(str(source), "held_out")


def test_embedded_source_reads_the_shipped_splits(tmp_path, monkeypatch):
    from sparseclt import embedded

    monkeypatch.setattr(embedded, "_DATA", tmp_path)
    write_gz(tmp_path / "train.jsonl.gz", '{"text": "seen"}\n')
    write_gz(tmp_path / "held_out.jsonl.gz", '{"text": "unseen"}\n')
    assert list(read_documents("embedded", "train")) == ["seen"]
    assert list(read_documents("embedded", "held_out")) == ["unseen"]


def test_embedded_files(tmp_path, monkeypatch):
    from sparseclt import embedded

    monkeypatch.setattr(embedded, "_DATA", tmp_path)
    for missing in (embedded.model_directory, embedded.build_figures, lambda: embedded.corpus("train")):
        with pytest.raises(FileNotFoundError, match="is missing: .*tools/build_embedded.py"):
            missing()
    (tmp_path / "build.json").write_text('{"steps": 3}')
    (tmp_path / "model").mkdir()
    assert embedded.build_figures() == {"steps": 3}
    assert embedded.model_directory() == tmp_path / "model"
    with pytest.raises(ValueError, match="split: expected 'train' or 'held_out', got 'test'"):
        embedded.corpus("test")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set that the `datasets` library itself loads, from a directory instead of the hub."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "train.jsonl", ["one", "two"])
    return tmp_path / "set"


def test_hub_splits_are_found_by_their_usual_names(hub):
    write_jsonl(hub / "test.jsonl", ["three"])
    assert list(read_documents(f"hf:{hub}", "train")) == ["one", "two"]
    assert list(read_documents(f"hf:{hub}", "held_out")) == ["three"]
    write_jsonl(hub / "validation.jsonl", ["four"])
    assert list(read_documents(f"hf:{hub}", "held_out")) == ["four"]
    assert list(read_documents(f"hf:{hub}:default", "train")) == ["one", "two"]


def test_hub_errors_name_what_was_found(hub):
    with pytest.raises(NoHeldOutSplit, match="train"):
        read_documents(f"hf:{hub}", "held_out")
    with pytest.raises(ValueError, match=r"data.text_field: .*\['text'\] .*got 'body'"):
        list(read_documents(f"hf:{hub}", "train", "body"))
    with pytest.raises(ValueError, match="data.source: .*could not be read from the hub"):
        read_documents(f"hf:{hub}:other", "train")


def test_paths_that_do_not_exist_are_named():
    for source in ("./nowhere", "corpus.txt", "/nowhere/at/all", "a/b/c.jsonl"):
        with pytest.raises(ValueError, match="data.source: expected .*which does not exist"):
            read_documents(source, "train")


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="data.source: .*got none in"):
        read_documents(str(tmp_path), "train")
    (tmp_path / "a.csv").write_text("text\none\n")
    with pytest.raises(ValueError, match=r"data.source: expected a .txt, .jsonl or .json file .*a.csv"):
        read_documents(str(tmp_path / "a.csv"), "train")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text"\n')
    with pytest.raises(ValueError, match="data.source: expected JSON in .*line 2"):
        list(read_documents(str(tmp_path / "a.jsonl"), "train"))
    with pytest.raises(ValueError, match="split: expected"):
        read_documents(str(tmp_path), "test")


def test_a_missing_text_field_names_the_fields_found(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"title": "t", "body": "b"}\n')
    with pytest.raises(ValueError, match=r"data.text_field: .* fields \['body', 'title'\] .*'text'"):
        list(read_documents(str(tmp_path / "a.jsonl"), "train"))
    (tmp_path / "a.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(ValueError, match="data.text_field: expected a field of text, .*int"):
        list(read_documents(str(tmp_path / "a.jsonl"), "train"))


def test_documents_begin_with_the_start_token_and_run_on_over_rows(tokenizer):
    rows = token_rows(tokenizer, ["w1 w2", "w3 w4 w5 w6", "w7"], 4)
    assert rows.dtype == torch.int32
    assert rows.tolist() == [[0, 1, 2, 0], [3, 4, 5, 6]]  # 0 7 are left over


def test_the_start_token_is_eos_where_there_is_no_bos(tokenizer):
    without = tiny_models.tokenizer()
    without.bos_token, without.eos_token = None, "w9"
    assert token_rows(without, ["w1 w2"], 3).tolist() == [[9, 1, 2]]
    without.eos_token = None
    with pytest.raises(ValueError, match="tokenizer: expected one with a BOS or EOS token"):
        token_rows(without, ["w1 w2"], 3)


def test_no_more_is_read_than_max_tokens_needs(tokenizer):
    read = []

    def documents():
        for number in range(1000):
            read.append(number)
            yield "w1 w2 w3"

    assert token_rows(tokenizer, documents(), 4, max_tokens=11).tolist() == [[0, 1, 2, 3]] * 2
    assert len(read) < 100


def test_rows_do_not_depend_on_how_many_documents_are_tokenized_at_once(tokenizer, monkeypatch):
    documents = [f"w{1 + i % 40} w{1 + i % 7}" for i in range(30)]
    expected = token_rows(tokenizer, documents, 4)
    monkeypatch.setattr("sparseclt.data.text.DOCUMENTS_AT_ONCE", 7)
    assert torch.equal(token_rows(tokenizer, documents, 4), expected) and expected.shape == (22, 4)


def test_too_little_text_is_refused_with_its_size(tokenizer):
    with pytest.raises(ValueError, match="documents: .*got an empty data set"):
        token_rows(tokenizer, [], 4)
    with pytest.raises(ValueError, match="at least one row of 4 tokens, got 3 tokens"):
        token_rows(tokenizer, ["w1 w2"], 4)
    with pytest.raises(ValueError, match="row_length: expected at least 2 tokens, got 1"):
        token_rows(tokenizer, ["w1 w2"], 1)


def numbered(rows: int) -> torch.Tensor:
    return torch.arange(rows, dtype=torch.int32)[:, None].repeat(1, 3)


def taken(stream: RowStream, batches: int) -> list[int]:
    return torch.cat(list(islice(stream, batches)))[:, 0].tolist()


@pytest.mark.parametrize("batch_rows", [1, 4, 7, 25])
def test_every_epoch_is_all_rows_in_an_order_of_its_own(batch_rows):
    order = taken(RowStream(numbered(10), batch_rows, seed=3), 50)
    epochs = [order[i : i + 10] for i in range(0, len(order) - 9, 10)]
    assert len(epochs) >= 5 and all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(10))


def test_the_order_depends_on_the_seed_alone():
    order = taken(RowStream(numbered(10), 4, seed=3), 10)
    torch.manual_seed(7)
    assert taken(RowStream(numbered(10), 8, seed=3), 5) == order
    assert taken(RowStream(numbered(10), 4, seed=4), 10) != order


@pytest.mark.parametrize("consumed", range(8))
def test_a_stream_goes_on_at_anothers_position(consumed):
    stream = RowStream(numbered(10), 4, seed=3)
    list(islice(stream, consumed))
    resumed = RowStream(numbered(10), 4, seed=3, position=stream.position)
    assert stream.position == 4 * consumed
    assert taken(resumed, 9) == taken(stream, 9) and resumed.position == stream.position


def test_a_batch_is_whole_rows_of_the_same_dtype():
    batch = next(RowStream(numbered(5), 8, seed=0))
    assert batch.shape == (8, 3) and batch.dtype == torch.int32 and (batch == batch[:, :1]).all()


def test_row_stream_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"rows: expected at least one row, .*\(0, 3\)"):
        RowStream(numbered(0), 4, seed=0)
    with pytest.raises(ValueError, match="batch_rows: expected at least 1, got 0"):
        RowStream(numbered(5), 0, seed=0)
    with pytest.raises(ValueError, match="position: .*got -1"):
        RowStream(numbered(5), 1, seed=0, position=-1)


def test_held_out_rows_are_split_off_once_and_for_all():
    rest, held_out = split_held_out(numbered(20), 0.25, seed=1)
    assert len(held_out) == 5 and sorted([*rest[:, 0].tolist(), *held_out[:, 0].tolist()]) == list(range(20))
    assert torch.equal(split_held_out(numbered(20), 0.25, seed=1)[1], held_out)
    assert not torch.equal(split_held_out(numbered(20), 0.25, seed=2)[1], held_out)
    assert [len(part) for part in split_held_out(numbered(2), 0.01, seed=1)] == [1, 1]
    assert [len(part) for part in split_held_out(numbered(2), 0.99, seed=1)] == [1, 1]


def test_impossible_held_out_splits_are_refused():
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="fraction: expected more than 0 and less than 1"):
            split_held_out(numbered(20), fraction, seed=1)
    with pytest.raises(ValueError, match="rows: expected at least 2 .*got 1"):
        split_held_out(numbered(1), 0.5, seed=1)
