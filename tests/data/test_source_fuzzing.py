"""Whatever is in a file: its text as it stands, or one line that names the file."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from texts import compressed, read, write

from sparseclt.data import documents

NAMES = [f"a.{kind}{suffix}" for kind in ("txt", "jsonl", "json") for suffix in ("", ".gz", ".zst")] + ["a.parquet"]
few = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def texts_or_one_line(path) -> list[str]:
    try:
        return read(path)
    except ValueError as error:
        assert str(error).startswith("data.") and "\n" not in str(error) and str(path) in str(error), error
        return []


@pytest.mark.parametrize("name", NAMES)
@few
@given(data=st.binary(max_size=300))
def test_any_bytes(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    texts_or_one_line(tmp_path / name)
    if name.endswith((".gz", ".zst")):
        write(tmp_path / name, data)
        texts_or_one_line(tmp_path / name)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "a"]), inner),
    max_leaves=5,
)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
@few
@given(values=st.lists(json_values, max_size=3))
def test_any_json(tmp_path, name, values):
    lines = "\n".join(map(json.dumps, values)) if "jsonl" in name else json.dumps(values)
    texts_or_one_line(write(tmp_path / name, lines))


@pytest.mark.parametrize("name", NAMES[:3])
@few
@given(text=st.text(max_size=300))
def test_any_text_is_read_as_it_stands(tmp_path, monkeypatch, name, text):
    monkeypatch.setattr(documents, "LONGEST", 30)
    monkeypatch.setattr(documents, "PART", 10)
    found = "".join(read(write(tmp_path / name, text)))
    assert found == (text.removeprefix("\ufeff") if text.removeprefix("\ufeff").strip() else "")


@few
@given(cut=st.integers(0, 99), name=st.sampled_from(["a.txt.gz", "a.txt.zst"]))
def test_a_file_cut_short_anywhere_is_noticed(tmp_path, cut, name):
    data = compressed(bytes(range(32, 127)) * 9, name[-4:].removeprefix("t"))
    (tmp_path / name).write_bytes(data[: len(data) * cut // 100])
    if cut and len(data) * cut // 100:
        with pytest.raises(ValueError, match="damaged or cut short"):
            read(tmp_path / name)
