"""Documents from every kind of source, and errors that name the file and the place in it."""

import json
from itertools import islice

import pytest
from texts import compressed, read, write, write_jsonl, write_parquet

from sparseclt.data import documents
from sparseclt.data.documents import passages
from sparseclt.data.sources import NoHeldOutSplit, open_source

COMPRESSIONS = ("", ".gz", ".zst")


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_text_file_is_one_document_as_it_stands(tmp_path, suffix):
    text = "w1 w2\r\nw3\n\n ß…\u2028𝄞\x00\n"
    assert read(write(tmp_path / f"a.txt{suffix}", text)) == [text]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_json_holds_objects_or_strings(tmp_path, suffix):
    write_jsonl(tmp_path / f"a.jsonl{suffix}", ["one", "t\u2028wo"], "body")
    write(tmp_path / f"b.jsonl{suffix}", '"one"\n\n"t\u2028wo"\n')
    write(tmp_path / f"c.json{suffix}", json.dumps(["one", {"body": "t\u2028wo"}]))
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        assert read(tmp_path / f"{name}{suffix}", field="body") == ["one", "t\u2028wo"]


def test_parquet_holds_a_column_of_text(tmp_path):
    texts = [f"text {i}" for i in range(200)]
    assert read(write_parquet(tmp_path / "a.parquet", texts, "body"), field="body") == texts


def test_a_byte_order_mark_is_no_text(tmp_path):
    write(tmp_path / "a.txt", b"\xef\xbb\xbfone \xef\xbb\xbf")
    write(tmp_path / "a.jsonl", b'\xef\xbb\xbf"one"\n')
    write(tmp_path / "a.json", b'\xef\xbb\xbf["one"]')
    assert read(tmp_path / "a.txt") == ["one \ufeff"]
    assert read(tmp_path / "a.jsonl") == read(tmp_path / "a.json") == ["one"]


def test_documents_without_text_are_left_out(tmp_path):
    assert read(write_jsonl(tmp_path / "a.jsonl", ["one", "", " \n", "two"])) == ["one", "two"]
    assert read(write_parquet(tmp_path / "a.parquet", ["one", "", " \n", "two"])) == ["one", "two"]


def test_a_directory_is_read_in_order_of_name_with_its_held_out_file_apart(tmp_path):
    write(tmp_path / "b.txt", "third")
    write(tmp_path / "a.jsonl.gz", '"first"\n"second"\n')
    write(tmp_path / "c.txt.zst", "fourth")
    write_parquet(tmp_path / "d.parquet", ["fifth"])
    write(tmp_path / "held_out.txt", "unseen")
    for other in ("build.json", "more.json.gz", "table.csv", "notes.parquet.gz"):
        write(tmp_path / other, "{}")
    (tmp_path / "model").mkdir()
    assert read(tmp_path) == ["first", "second", "third", "fourth", "fifth"]
    assert read(tmp_path, "held_out") == ["unseen"]


def test_sources_without_held_out_documents_say_so(tmp_path):
    write(tmp_path / "a.txt", "w1")
    for source in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(NoHeldOutSplit):
            open_source(str(source), "held_out")


def test_embedded_source_reads_the_shipped_splits(tmp_path, monkeypatch):
    from sparseclt import embedded

    monkeypatch.setattr(embedded, "_DATA", tmp_path)
    write(tmp_path / "train.jsonl.gz", '{"text": "seen"}\n')
    write(tmp_path / "held_out.jsonl.gz", '{"text": "unseen"}\n')
    assert read("embedded") == ["seen"]
    assert read("embedded", "held_out") == ["unseen"]


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
    assert read(f"hf:{hub}") == ["one", "two"]
    assert read(f"hf:{hub}", "held_out") == ["three"]
    write_jsonl(hub / "validation.jsonl", ["four"])
    assert read(f"hf:{hub}", "held_out") == ["four"]
    assert read(f"hf:{hub}:default") == ["one", "two"]


def test_the_fingerprint_of_a_hub_data_set_follows_its_text(hub):
    before = open_source(f"hf:{hub}", "train").fingerprint
    assert open_source(f"hf:{hub}", "train").fingerprint == before
    write_jsonl(hub / "train.jsonl", ["one", "three"])
    assert open_source(f"hf:{hub}", "train").fingerprint != before


def test_hub_errors_name_what_was_found(hub):
    with pytest.raises(NoHeldOutSplit, match="train"):
        open_source(f"hf:{hub}", "held_out")
    with pytest.raises(ValueError, match=r"data.text_field: .*\['text'\] .*train, record 1, got 'body'"):
        read(f"hf:{hub}", field="body")
    with pytest.raises(ValueError, match="data.source: .*could not be read from the hub"):
        open_source(f"hf:{hub}:other", "train")


def test_paths_that_do_not_exist_are_named():
    for source in ("./nowhere", "corpus.txt", "/nowhere/at/all", "a/b/c.jsonl", "corpus.parquet", "corpus.txt.zst"):
        with pytest.raises(ValueError, match="data.source: expected .*which does not exist"):
            open_source(source, "train")


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="data.source: .*got none in"):
        open_source(str(tmp_path), "train")
    for name in ("a.csv", "a.parquet.gz", "a.txt.bz2"):
        write(tmp_path / name, "text\none\n")
        with pytest.raises(ValueError, match=rf"data.source: expected a .txt, .jsonl or .json file .*{name}"):
            open_source(str(tmp_path / name), "train")
    with pytest.raises(ValueError, match="split: expected"):
        open_source(str(tmp_path), "test")
    write(tmp_path / "held_out.txt", "w1")
    with pytest.raises(ValueError, match="data.source: expected files to train on, got only held_out"):
        open_source(str(tmp_path), "train")


def test_a_missing_text_field_names_the_fields_found(tmp_path):
    write(tmp_path / "a.jsonl", '{"title": "t", "body": "b"}\n')
    with pytest.raises(ValueError, match=r"data.text_field: .* fields \['body', 'title'\] .*line 1.*'text'"):
        read(tmp_path / "a.jsonl")
    write(tmp_path / "a.jsonl", '{"text": 3}\n')
    with pytest.raises(ValueError, match="data.text_field: expected a field of text, .*int"):
        read(tmp_path / "a.jsonl")
    write_parquet(tmp_path / "a.parquet", [3, 4])
    with pytest.raises(ValueError, match="data.text_field: expected a field of text, .*record 1 is int"):
        read(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"data.text_field: .* fields \['number', 'text'\] .*a.parquet, got 'body'"):
        read(tmp_path / "a.parquet", field="body")


LONG = "".join(f"line {i}\n" for i in range(300_000)).encode()  # several chunks
GZIP = compressed(b'"one"\n' * 99, ".gz")
DAMAGED = {
    "latin-1 at the beginning": ("a.txt", b"caf\xe9 au lait", r"expected UTF-8, got 0xe9 .* at byte 3 of "),
    "latin-1 far behind": ("a.txt", LONG + b"caf\xe9 ", rf"0xe9 .* at byte {len(LONG) + 3} of "),
    "cut inside a character": ("a.txt", LONG + "é".encode()[:1], rf"0xc3 .* at byte {len(LONG)} of "),
    "latin-1, compressed": ("a.txt.zst", compressed(b"caf\xe9 ", ".zst"), "0xe9 .* at byte 3 of "),
    "UTF-16": ("a.txt", "text".encode("utf-16"), "expected UTF-8, got 0xff .* at byte 0 of "),
    "latin-1 in a line": ("a.jsonl", b'"one"\n"caf\xe9"\n', "0xe9 .* at byte 4 of .*a.jsonl, line 2"),
    "UTF-16 lines": ("a.jsonl", '"one"\n'.encode("utf-16"), "expected UTF-8, got 0xff .* at byte 0 of .*line 1"),
    "no JSON": ("a.jsonl", b'"one"\n{"text"\n', "expected JSON in .*a.jsonl, line 2"),
    "no JSON at all": ("a.json", b"text", "expected JSON in .*a.json"),
    "deep JSON": ("a.jsonl", b"[" * 100_000 + b"\n", "expected JSON in .*line 1: .*recursion"),
    "half a surrogate pair": ("a.jsonl", b'"one"\n"two \\ud800"\n', "line 2, but its character 4 is half of a surr"),
    "a number": ("a.jsonl", b"3\n", "expected text or an object in .*line 1, got int"),
    "no gzip": ("a.txt.gz", b"plain text", "could not read .*a.txt.gz .* damaged or cut short: Not a gzipped file"),
    "gzip cut short": ("a.txt.gz", compressed(LONG, ".gz")[:-9], "could not read .*a.txt.gz beyond byte .*cut short"),
    "gzip of other bytes": ("a.jsonl.gz", GZIP[:-8] + bytes(4) + GZIP[-4:], "could not read .*a.jsonl.gz .*CRC check"),
    "no zstd": ("a.txt.zst", b"plain text", "could not read .*a.txt.zst .* damaged or cut short"),
    "zstd cut short": ("a.txt.zst", compressed(LONG, ".zst")[:-9], "could not read .*a.txt.zst beyond byte"),
    "zstd lines cut short": ("a.jsonl.zst", compressed(b'"one"\n' * 99, ".zst")[:-9], "could not read .*a.jsonl.zst"),
    "no Parquet": ("a.parquet", b"plain text", "expected a whole Parquet file, got .*a.parquet"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "data", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_files_are_one_line_that_names_file_and_place(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)


def test_a_parquet_file_cut_short_or_with_changed_bytes_is_named(tmp_path):
    data = write_parquet(tmp_path / "a.parquet", [f"text {i} " * 9 for i in range(999)]).read_bytes()
    for spoiled in (data[:-9], data[:10] + bytes(len(data) // 2) + data[10 + len(data) // 2 :]):
        (tmp_path / "a.parquet").write_bytes(spoiled)
        with pytest.raises(ValueError, match="data.source: .*a.parquet") as error:
            read(tmp_path / "a.parquet")
        assert "\n" not in str(error.value)


def test_a_directory_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ValueError, match="data.source: .*a.txt"):
        read(tmp_path)


def test_nothing_is_read_beyond_what_is_needed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["w1 " * 1000] * 2000)
    path.write_bytes(path.read_bytes() + b"no JSON")
    source = open_source(str(path), "train")
    assert len(list(islice(source.passages(), 10))) == 10
    assert source.records()[0]["bytes"] <= 1 << 20 and not source.records()[0]["whole"]


def test_long_documents_come_in_parts_that_lose_nothing(monkeypatch):
    monkeypatch.setattr(documents, "LONGEST", 1000)
    monkeypatch.setattr(documents, "PART", 200)
    for text in ("word " * 900, "a line\n" * 500, "x" * 3000, "\n" * 3000, "𝄞 é\r\n" * 600, "tail " * 300 + " " * 90):
        chunks = [text[i : i + 77] for i in range(0, len(text), 77)]
        found = list(passages(chunks))
        assert "".join(p.text for p in found) == text and len(found) > 1 and max(len(p.text) for p in found) <= 200
        for earlier, later in zip(found, found[1:], strict=False):
            assert later.before and earlier.text.endswith(later.before)
        assert not found[0].before
    assert [p.text for p in passages(["w " * 400, "end"])] == ["w " * 400 + "end"]
    assert list(passages([" ", "\n"])) == []
    cuts = list(passages(["a line\n" * 500]))
    assert all(p.text.endswith("\n") for p in cuts)
