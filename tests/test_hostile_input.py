"""Files from anybody: one error that names the file and the place, and nothing in them is run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from clts import connect_random

from sparseclt import SparseCLT
from sparseclt.cli import main
from sparseclt.config import TrainConfig, from_dict, to_dict
from sparseclt.config.strict import ConfigError
from sparseclt.model.attention import AttentionWeights
from sparseclt.model.shape import Architecture, ModelShape
from sparseclt.storage import directories
from sparseclt.storage.checkpoint import load_state, save_state, whole_number
from sparseclt.storage.directories import CheckpointError, verify
from sparseclt.storage.safetensors_stream import save_file
from sparseclt.training.loggers import read_metrics, truncate_after

L, D, F, H = 2, 4, 6, 2


def tiny_clt() -> SparseCLT:
    torch.manual_seed(0)
    shape = ModelShape(layers=L, d_model=D, heads=H, context=9, name="tiny")
    attention = [AttentionWeights(torch.randn(H, D, 2), torch.randn(H, 2, D), torch.randn(D), True) for _ in range(L)]
    clt = SparseCLT(Architecture(shape, F, 2, "latents"), attention)
    connect_random(clt, 3)
    return clt


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clts") / "clt"
    clt = tiny_clt()
    clt.save_pretrained(path)
    save_state(path, {"moment": torch.ones(3)}, {"step": 4, "micro_rows": 2})
    sign(path)
    return path


@pytest.fixture
def saved(template, tmp_path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "clt"))


def sign(path: Path) -> None:
    """Give a directory the manifest of what it now holds: the digests agree, whoever wrote the files."""
    (path / "manifest.json").unlink(missing_ok=True)
    directories._write_manifest(path)


def sign_as(path: Path, files: dict) -> None:
    (path / "manifest.json").write_text(json.dumps({"files": files, "blake2b": directories._listing_digest(files)}))


def refused(saved: Path, message: str, read: Callable = SparseCLT.from_pretrained) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read(saved)
    assert "\n" not in str(error.value) and str(saved.parent) in str(error.value) and len(str(error.value)) < 600


def test_a_config_with_yaml_tags_runs_nothing(saved, tmp_path):
    proof = tmp_path / "it ran"
    (saved / "config.yaml").write_text(f"model_name: !!python/object/apply:os.mkdir ['{proof}']\n")
    refused(saved, "config.yaml has .* bytes, expected")
    sign(saved)
    assert SparseCLT.from_pretrained(saved).architecture.model.name == "tiny"
    assert not proof.exists()


def header(tensors: dict | str, content: bytes = bytes(24), length: int | None = None) -> bytes:
    text = (tensors if isinstance(tensors, str) else json.dumps(tensors)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def entry(begin: int = 0, end: int = 24, dtype: str = "F32", shape: tuple = (6,)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "empty": b"",
    "no header": bytes(8),
    "a header longer than the file": header({"b_enc_0": entry()}, length=10_000),
    "a header of exabytes": header({"b_enc_0": entry()}, length=2**62),
    "a header of 17 MiB": header(" " * (17 << 20)),
    "no JSON": header("{'b_enc_0'}"),
    "a list": header("[]"),
    "deep nesting": header('{"b_enc_0":' * 50_000),
    "not UTF-8": header("{").replace(b"{", b"\xff"),
    "a name twice": header(f'{{"b_enc_0": {json.dumps(entry())}, "b_enc_0": {json.dumps(entry())}}}'),
    "bytes in common": header({"b_enc_0": entry(), "b_dec_0": entry(8, 24, shape=(4,))}),
    "bytes behind the end": header({"b_enc_0": entry(0, 2400, shape=(600,))}),
    "bytes that nobody has": header({"b_enc_0": entry(0, 16, shape=(4,))}),
    "a negative size": header({"b_enc_0": entry(shape=(-6,))}),
    "sizes that overflow": header({"b_enc_0": entry(shape=(2**40, 2**40))}),
    "an unknown dtype": header({"b_enc_0": entry(dtype="F33")}),
    "another dtype": header({"b_enc_0": entry(dtype="I32")}),
    "no such tensor": header({"b_enc_1": entry()}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_file_that_lies(saved, lie):
    (saved / "W_enc_0.safetensors").write_bytes(LIES[lie])
    sign(saved)
    refused(saved, "W_enc_0.safetensors|expected W_enc files of 2 layers, as sparseclt.json says, found 1")
    (saved / "state.safetensors").write_bytes(LIES[lie].replace(b"b_enc_0", b"moment\0"))
    sign(saved)
    if lie not in ("another dtype", "no such tensor"):
        refused(saved, "state.safetensors", load_state)


BROKEN_JSON = {
    "empty": b"",
    "not UTF-8": b'{"model_name": "\xff"}',
    "UTF-16": '{"format_version": 2}'.encode("utf-16"),
    "cut off": b'{"format_version": 2, "numbers": {',
    "a list": b"[]",
    "text": b'"format_version"',
    "null": b"null",
    "deep nesting": b'{"files":' * 100_000,
    "a key twice": b'{"format_version": 2, "format_version": 2}',
    "NaN": b'{"format_version": NaN}',
    "5000 digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "no version": b"{}",
    "another version": b'{"format_version": 1e999}',
    "true for a version": b'{"format_version": true}',
    "nothing else": b'{"format_version": 2}',
}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_json_that_is_broken(saved, kind):
    for name, read in (
        ("sparseclt.json", SparseCLT.from_pretrained),
        ("state.json", load_state),
        ("manifest.json", verify),
    ):
        broken = Path(shutil.copytree(saved, saved.with_name(f"broken {name}")))
        (broken / name).write_bytes(BROKEN_JSON[kind])
        if name != "manifest.json":
            sign(broken)
        refused(broken, name, read)


WRONG = {
    "model": [None, [], "gpt2", {}, {"layers": "2"}, {"layers": 2, "d_model": 4, "unknown\nfield": 1}],
    "latents": [None, "6", 6.0, True, -6, 0, 2**70, [6], float("1e300"), 7],
    "active": [7, 0, {}],
    "attention": ["", "eager", 1],
    "bandwidth": ["wide", {}],
    "unknown": [1],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_an_architecture_that_makes_no_sense(saved, field, value):
    file = saved / "sparseclt.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    sign(saved)
    refused(saved, "sparseclt.json is no CLT's configuration|safetensors: .* has shape|as sparseclt.json says")


@pytest.mark.parametrize(("field", "value"), [("layers", 10**18), ("layers", 1), ("d_model", 10**15), ("heads", 3)])
def test_an_architecture_of_other_sizes_allocates_nothing(saved, field, value):
    file = saved / "sparseclt.json"
    content = json.loads(file.read_text())
    content["model"][field] = value
    file.write_text(json.dumps(content))
    sign(saved)
    refused(saved, "has shape .*, expected|as sparseclt.json says, found 2")


def test_tensors_of_other_shapes_and_connections_out_of_range(saved):
    good = tiny_clt()
    module = next(module for module in good if module.site.name == "mlp_1")
    indices = module.connection_indices.int()
    other, twice, beyond = indices[:5], indices.clone(), indices.clone()
    twice[0, :] = 2
    beyond[3, 1] = 10**9
    file = saved / "connections_1.safetensors"
    for connections, message in (
        (other, r"connections_1 has shape \[5, 3\], expected \[6, any\]"),
        (indices.float(), "connections_1 is of dtype F32, expected I32"),
        (twice, "connections_1: connections: expected distinct ids"),
        (beyond, "connections_1: connections: expected .*, got .*1000000000"),
        (beyond.neg(), "connections_1: connections: expected .*, got .*-1000000000"),
    ):
        save_file({"connections_1": connections}, file)
        sign(saved)
        refused(saved, message)
    save_file({"connections_1": indices, "logits_1": torch.zeros(F, 2)}, file)
    sign(saved)
    refused(saved, r"logits_1 has shape \[6, 2\], expected \[6, 3\]")


def test_files_that_a_manifest_may_not_list(saved, tmp_path):
    (tmp_path / "secret").write_text("x")
    files = json.loads((saved / "manifest.json").read_text())["files"]
    secret = {"size": 1, "blake2b": directories._digest(tmp_path / "secret")}
    for name in (
        "../secret", str(tmp_path / "secret"), "", ".", "a/../../secret", "manifest.json", "a//b", "a\\b", "a\0b",
        "a\nb", "\ud800", "x" * 300, "x/" * 1000 + "x",
    ):  # fmt: skip
        sign_as(saved, files | {name: secret})
        refused(saved, "manifest.json lists .*: expected files below")
    for wrong in ([], {"size": "1", "blake2b": ""}, {"size": 1}, {"size": True, "blake2b": ""}, None):
        sign_as(saved, files | {"W_enc_0.safetensors": wrong})
        refused(saved, "manifest.json is damaged: expected a size and a blake2b")


@pytest.mark.parametrize("name", ["W_enc_0.safetensors", "manifest.json", "sparseclt.json", "sub"])
def test_links_are_refused_by_name(saved, tmp_path, name):
    (saved / "sub").mkdir()
    (saved / "sub" / "notes.txt").write_text("x")
    sign(saved)
    verify(saved)
    outside = Path(shutil.move(saved / name, tmp_path / "outside"))
    (saved / name).symlink_to(outside)
    refused(saved, f"clt/{name} is a symbolic link: expected a file of the checkpoint")


def test_a_pipe_does_not_stop_the_reader(saved):
    (saved / "W_enc_0.safetensors").unlink()
    os.mkfifo(saved / "W_enc_0.safetensors")
    refused(saved, "W_enc_0.safetensors is missing")


CONFIGS = {
    "not UTF-8": (b'{"out": "\xff"}', "config.json is damaged ('utf-8' codec"),
    "cut off": (b'{"steps": 5', "config.json is damaged (Expecting ',' delimiter: line 1 column 12"),
    "a list": (b"[]", "expected a JSON object, got a value of type list"),
    "a key twice": (b'{"steps": 5, "steps": 6}', "the key 'steps' comes twice"),
    "deep nesting": (b'{"clt":' * 100_000, "recursion"),
    "5000 digits": (b'{"steps": ' + b"9" * 5000 + b"}", "config.json is damaged (Exceeds the limit"),
    "NaN": (b'{"loss": {"l0_weight": NaN}}', "config.json is damaged (NaN is not JSON)"),
    "1e999": (b'{"loss": {"l0_weight": 1e999}}', "config.json: loss.l0_weight: expected a finite number, got inf"),
    "a wrong type": (b'{"clt": {"active": "16"}}', "config.json: clt.active: expected a whole number, got '16'"),
    "an unknown field": (b'{"a\\nb": 1}', "config.json: config: unknown field 'a\\nb'; expected one of out, steps"),
}


@pytest.mark.parametrize("command", ["eval", "resume", "repeat"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_broken_run_is_one_line_of_the_command(tmp_path, capsys, command, kind):
    content, message = CONFIGS[kind]
    (tmp_path / "config.json").write_bytes(content)
    extra = [str(tmp_path / "again")] if command == "repeat" else []
    assert main([command, str(tmp_path), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sparseclt: ") and error.count("\n") == 1 and message in error and str(tmp_path) in error


@pytest.mark.parametrize(
    "values", [{1: 2}, {"steps": 10**5000}, {"steps": {1}}, {"clt": None}, {"out": "\ud800"}, {"steps": float("nan")}],
    ids=["no text for a key", "digits", "a set", "none", "half a character", "NaN"],
)  # fmt: skip
def test_values_from_python_are_config_errors_too(values):
    with pytest.raises(ConfigError):
        from_dict(values)
    loop = to_dict(TrainConfig())
    loop["clt"] = loop
    with pytest.raises(ConfigError, match="config: expected plain JSON values"):
        from_dict(loop)


def test_training_state_of_another_kind(saved):
    tensors, numbers = load_state(saved)
    target = torch.zeros(3)
    tensors.copy_into("moment", target)
    assert target.tolist() == [1, 1, 1] and whole_number(saved, numbers, "step", 0) == 4
    for name, wrong, message in (
        ("moment", torch.zeros(1), r"state.safetensors: moment has shape \[3\], expected \[1\]"),
        ("moment", torch.zeros(3, dtype=torch.float64), "state.safetensors: moment is of dtype F32, expected F64"),
        ("velocity", torch.zeros(3), "clt lacks the tensor 'velocity': expected one of shape"),
    ):
        refused(saved, message, lambda _, name=name, wrong=wrong: tensors.copy_into(name, wrong))
    for value in (None, "4", 4.0, True, -1):
        with pytest.raises(CheckpointError, match="state.json: expected step, a whole number of at least 0, got"):
            whole_number(saved, {**numbers, "step": value}, "step", 0)


@pytest.mark.parametrize("numbers", [None, [], {"step": None}, {"step": [4]}, {"step": {}}])
def test_numbers_of_another_kind(saved, numbers):
    (saved / "state.json").write_text(json.dumps({"format_version": 2, "numbers": numbers}))
    sign(saved)
    refused(saved, "state.json is damaged: expected numbers and text by name", load_state)


@pytest.mark.parametrize(
    "line", [b"\xff", b"[" * 100_000, b"[]", b"{}", b'{"step": "1"}', b'{"step": NaN}', b'{"step": true}']
)
def test_a_line_of_metrics_that_is_none(tmp_path, line):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    for read in (read_metrics, lambda file: truncate_after(file, 2)):
        with pytest.raises(ValueError, match=f"{file}, line 2 is not .*: repair or remove the line"):
            read(file)
