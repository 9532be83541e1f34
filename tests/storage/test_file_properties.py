"""Damage of any kind to any file of a checkpoint: a CheckpointError, or exactly what was saved."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from clts import connect_random
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseclt import SparseCLT
from sparseclt.model.shape import Architecture, ModelShape
from sparseclt.storage import directories
from sparseclt.storage.checkpoint import load_state, save_state
from sparseclt.storage.directories import CheckpointError
from sparseclt.storage.safetensors_stream import NAMES, TensorFiles, save_file, stored_names

QUICK = settings(max_examples=80, deadline=None, derandomize=True, database=None)
DTYPES = {name: dtype for dtype, name in NAMES.items()}
JSON = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just([]) | st.just({})


def clt() -> SparseCLT:
    torch.manual_seed(0)
    made = SparseCLT(Architecture(ModelShape(layers=2, d_model=3, heads=1, name="tiny"), 4, 2))
    connect_random(made, 2)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "step_00000004"
    clt().save_pretrained(path)
    save_state(path, {"moment": torch.arange(5.0), "counts": torch.arange(3)}, {"step": 4, "rate": 0.1})
    sign(path)
    return path


def sign(path: Path) -> None:
    """A manifest of what is there now, as somebody would write who wants it to be read."""
    (path / "manifest.json").unlink(missing_ok=True)
    directories._write_manifest(path)


def everything(path: Path) -> dict[str, object]:
    """All that the readers give, in an order and a form that can be compared bit for bit."""
    weights, (tensors, numbers) = SparseCLT.from_pretrained(path), load_state(path)
    parts = {**weights.state_dict(), **tensors}
    bits = {name: (x.dtype, x.shape, x.contiguous().view(-1).view(torch.uint8).tolist()) for name, x in parts.items()}
    return {"architecture": weights.architecture, "numbers": numbers, **bits}


@pytest.fixture(scope="module")
def expected(saved) -> dict[str, object]:
    return everything(saved)


def damaged(content: bytes, how: str, begin: int, end: int, piece: bytes) -> bytes:
    begin, end = sorted((begin % (len(content) + 1), end % (len(content) + 1)))
    return {
        "cut": content[:begin],
        "flip": content[:begin] + bytes(b ^ 1 << end % 8 for b in content[begin : begin + 1]) + content[begin + 1 :],
        "insert": content[:begin] + piece + content[begin:],
        "replace": content[:begin] + piece + content[begin + len(piece) :],
        "remove": content[:begin] + content[end:],
        "double": content[:end] + content[begin:],
        "zero": content[:begin] + bytes(end - begin) + content[end:],
    }[how]


DAMAGE = st.tuples(
    st.sampled_from(["cut", "flip", "insert", "replace", "remove", "double", "zero"]),
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.binary(min_size=1, max_size=4) | st.sampled_from([b'"', b"}", b"[", b"0", b"9", b"-", b",", b"\n"]),
)
FILES = (
    "W_dec_0.safetensors", "W_dec_1.safetensors", "W_enc_0.safetensors", "W_enc_1.safetensors", "config.yaml",
    "connections_1.safetensors", "manifest.json", "sparseclt.json", "state.json", "state.safetensors",
)  # fmt: skip


def test_these_are_all_files(saved):
    assert tuple(sorted(path.name for path in saved.iterdir())) == FILES


@QUICK
@given(name=st.sampled_from(FILES), damage=DAMAGE)
def test_damage_is_an_error_or_does_not_matter(saved, expected, name, damage):
    file = saved / name
    content = file.read_bytes()
    try:
        file.write_bytes(damaged(content, *damage))
        assert everything(saved) == expected
    except CheckpointError as error:
        assert str(saved) in str(error) and "\n" not in str(error)
    finally:
        file.write_bytes(content)


@QUICK
@given(name=st.sampled_from([name for name in FILES if name != "manifest.json"]), damage=DAMAGE)
def test_what_somebody_made_is_an_error_or_a_clt(saved, name, damage):
    """Not only damage: the digests agree with the files. What is read may be anything then, but of the right shapes."""
    forged = saved.with_name("forged")
    shutil.rmtree(forged, ignore_errors=True)
    shutil.copytree(saved, forged)
    (forged / name).write_bytes(damaged((saved / name).read_bytes(), *damage))
    sign(forged)
    accepted(forged)


def accepted(forged: Path) -> None:
    try:
        read = SparseCLT.from_pretrained(forged)
        assert read.architecture.model.layers == 2
        load_state(forged)
    except CheckpointError as error:
        assert str(forged) in str(error) and "\n" not in str(error)


@QUICK
@given(
    name=st.sampled_from(["sparseclt.json", "state.json"]),
    key=st.sampled_from(["format_version", "model", "latents", "active", "attention", "numbers", "layers", "d_model"]),
    value=JSON,
)
def test_any_value_in_a_json_file_is_an_error_or_a_clt(saved, name, key, value):
    forged = saved.with_name("forged")
    shutil.rmtree(forged, ignore_errors=True)
    shutil.copytree(saved, forged)
    content = json.loads((saved / name).read_text())
    place = content["model"] if key in ("layers", "d_model") and name == "sparseclt.json" else content
    place[key] = value
    (forged / name).write_text(json.dumps(content))
    sign(forged)
    accepted(forged)


SIZES = st.integers(-1, 3) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 2**70])
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPES, "F33", 1]),
        "shape": st.lists(SIZES, max_size=3) | JSON,
        "data_offsets": st.lists(SIZES | st.integers(0, 40), min_size=2, max_size=2) | JSON,
        "extra": JSON,
    },
)


@settings(QUICK, max_examples=150)
@given(
    entries=st.dictionaries(
        st.sampled_from("ab") | st.text(max_size=2) | st.just("__metadata__"), ENTRY | JSON, max_size=3
    ),
    content=st.binary(max_size=40),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_any_header_is_an_error_or_says_where_the_tensors_lie(tmp_path_factory, entries, content, length):
    file = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    header = json.dumps(entries).encode()
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + content)
    try:
        names = stored_names(file)
        tensors = dict(TensorFiles({name: (file, name) for name in names}))
    except CheckpointError as error:
        assert str(file) in str(error) and "\n" not in str(error)
        return
    assert set(names) == set(entries) - {"__metadata__"}
    for name, tensor in tensors.items():
        begin, end = entries[name]["data_offsets"]
        assert tensor.dtype == DTYPES[entries[name]["dtype"]] and list(tensor.shape) == entries[name]["shape"]
        assert bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist()) == content[begin:end]


SHAPES = st.lists(st.integers(0, 3), max_size=3)


@QUICK
@given(st.dictionaries(st.text(max_size=3), st.tuples(st.sampled_from(sorted(DTYPES)), SHAPES), max_size=4))
def test_any_tensors_come_back_and_no_cut_of_their_file_goes_unnoticed(tmp_path_factory, kinds):
    file = tmp_path_factory.getbasetemp() / "whole.safetensors"
    tensors = {name: torch.ones(shape).cumsum(-1).to(DTYPES[dtype]) for name, (dtype, shape) in kinds.items() if shape}
    save_file(tensors, file)
    got = TensorFiles({name: (file, name) for name in stored_names(file)})
    assert got.keys() == tensors.keys() and all(got[name].equal(tensors[name]) for name in tensors)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="whole.safetensors"):
        stored_names(file)
