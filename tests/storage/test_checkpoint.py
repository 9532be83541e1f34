"""Checkpoints: exact round trips, damage that is noticed, crashes that lose nothing."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseclt.storage import checkpoint, clt_files, directories
from sparseclt.storage.checkpoint import latest, load_state, save_state
from sparseclt.storage.clt_files import load_clt, save_clt
from sparseclt.storage.directories import FORMAT_VERSION, CheckpointError, atomic_directory, verify

L, F, C, D = 3, 7, 2, 5
CONFIG = {"model_name": "gpt2", "k": 4, "sites": ["mlp", "attn"], "lr": 0.1 + 0.2}
NUMBERS: dict[str, int | float | str] = {"step": 2**60 + 1, "loss": 0.1 + 0.2, "zero": -0.0, "name": "é"}
CLT_FILES = [
    "manifest.json",
    "config.yaml",
    "sparseclt.json",
    "W_enc_1.safetensors",
    "W_dec_0.safetensors",
    "connections_1.safetensors",
    "attn_1.safetensors",
    "attn_connections_1.safetensors",
    "attn_model_1.safetensors",
    "state.safetensors",
    "state.json",
]


def clt_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(L):
        for site in ("mlp", "attn"):
            decoder = (F, L - layer, D) if site == "mlp" else (F, D)
            tensors |= {
                f"{site}.{layer}.W_enc": torch.randn(F, D),
                f"{site}.{layer}.b_enc": torch.randn(F, dtype=torch.bfloat16),
                f"{site}.{layer}.W_dec": torch.randn(decoder),
                f"{site}.{layer}.b_dec": torch.randn(D),
                f"{site}.{layer}.connections": torch.randint(-1, F, (F, C), dtype=torch.int32),
                f"{site}.{layer}.logits": torch.randn(F, C),
            }
        tensors |= {
            f"attn.{layer}.W_V": torch.randn(2, D, 3),
            f"attn.{layer}.W_O": torch.randn(2, 3, D),
            f"attn.{layer}.bias": torch.randn(D),
        }
    return tensors


def state_tensors() -> dict[str, torch.Tensor]:
    special = torch.tensor([math.nan, math.inf, -0.0, 1e-45])
    return {
        "rng": torch.get_rng_state(),
        "step": torch.tensor(3),
        "special": special,
        "empty": torch.zeros(0, 2),
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "checkpoint"
    write(path)
    return path


@pytest.fixture
def saved(tmp_path: Path, template: Path) -> Path:
    return shutil.copytree(template, tmp_path / "run" / "checkpoints" / "step_00000010")


def write(path: Path, config: dict = CONFIG) -> None:
    with atomic_directory(path) as directory:
        save_clt(directory, config, clt_tensors())
        save_state(directory, state_tensors(), NUMBERS)


def assert_same_bits(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype and got[name].shape == tensor.shape, name
        bits = [list(t.contiguous().reshape(-1).view(torch.uint8)) for t in (got[name], tensor)]
        assert bits[0] == bits[1], name


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_weights_and_config_come_back_bit_for_bit(saved: Path) -> None:
    config, tensors = load_clt(saved)
    assert config == CONFIG
    assert_same_bits(tensors, clt_tensors())


def test_training_state_comes_back_exactly(saved: Path) -> None:
    tensors, numbers = load_state(saved)
    assert_same_bits(tensors, state_tensors())
    assert numbers == NUMBERS and str(numbers["zero"]) == "-0.0"
    assert [type(value) for value in numbers.values()] == [type(value) for value in NUMBERS.values()]


def test_state_without_tensors_comes_back_empty(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "c") as directory:
        save_state(directory, {}, {})
    assert load_state(tmp_path / "c") == ({}, {})


def test_views_of_one_storage_and_parameters_are_saved(tmp_path: Path) -> None:
    flat = torch.nn.Parameter(torch.arange(12.0))
    tensors = {"a": flat[:6], "b": flat[6:], "all": flat, "transposed": flat.view(3, 4).T}
    with atomic_directory(tmp_path / "c") as directory:
        save_state(directory, tensors, {})
    assert_same_bits(load_state(tmp_path / "c")[0], {name: t.detach() for name, t in tensors.items()})


def test_files_follow_the_circuit_tracer_layout(saved: Path) -> None:
    tensors = clt_tensors()
    assert load_file(saved / "W_enc_1.safetensors").keys() == {"W_enc_1", "b_enc_1", "b_dec_1", "threshold_1"}
    assert load_file(saved / "W_dec_1.safetensors").keys() == {"W_dec_1"}
    connections = load_file(saved / "connections_1.safetensors")
    assert connections.keys() == {"connections_1", "logits_1"}
    assert torch.equal(connections["connections_1"], tensors["mlp.1.connections"])
    attention = load_file(saved / "attn_1.safetensors")
    assert attention.keys() == {"W_enc_attn_1", "b_enc_attn_1", "W_dec_attn_1", "b_dec_attn_1"}
    assert torch.equal(attention["W_dec_attn_1"], tensors["attn.1.W_dec"])
    yaml = (saved / "config.yaml").read_text()
    values = dict(line.split(": ") for line in yaml.splitlines() if not line.startswith("#"))
    assert values == {
        "model_kind": "uncalibrated_cross_layer_transcoder",
        "model_name": '"gpt2"',
        "feature_input_hook": '"ln2.hook_normalized"',
        "feature_output_hook": '"hook_mlp_out"',
    }
    assert "Not calibrated" in yaml and load_file(saved / "W_enc_1.safetensors")["threshold_1"].shape == (0,)
    assert json.loads((saved / "sparseclt.json").read_text()) == {"format_version": FORMAT_VERSION, **CONFIG}


def test_directories_from_before_thresholds_of_size_0_are_read(saved: Path, tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "older") as directory:
        for file in saved.iterdir():
            if file.name.startswith("W_enc"):
                kept = {name: t for name, t in load_file(file).items() if not name.startswith("threshold")}
                save_file(kept, directory / file.name)
            elif file.name != "manifest.json":
                shutil.copy(file, directory)
    assert_same_bits(load_clt(tmp_path / "older")[1], load_clt(saved)[1])


def test_no_file_holds_a_pickle(saved: Path) -> None:
    assert {file.suffix for file in saved.iterdir()} == {".safetensors", ".json", ".yaml"}
    for module in (checkpoint, clt_files, directories):
        code = Path(str(module.__file__)).read_text().split('"""', 2)[2]
        assert not re.search(r"pickle|torch\.(load|save)\b", code)


@pytest.mark.parametrize("name", CLT_FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped first", "flipped middle", "flipped last"])
def test_damage_to_any_file_is_noticed_and_named(saved: Path, name: str, damage: str) -> None:
    verify(saved)
    file = saved / name
    size = file.stat().st_size
    # The last byte of a JSON file is a newline, whose loss or change the manifest itself shrugs off.
    end = size - 2 if name == "manifest.json" else size - 1
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        os.truncate(file, end)
    else:
        flip(file, {"flipped first": 0, "flipped middle": size // 2, "flipped last": end}[damage])
    reason = {"missing": "missing", "truncated": "bytes, expected"}.get(damage, "changed bytes")
    reason = "damaged" if name == "manifest.json" and damage != "missing" else reason
    for read in (verify, load_clt, load_state):
        with pytest.raises(CheckpointError, match=f"{re.escape(str(file))}.*{reason}"):
            read(saved)


def test_a_file_cannot_drop_out_of_the_manifest_unnoticed(saved: Path) -> None:
    manifest = saved / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"W_enc_0', '"W_enc_1'))  # a duplicate key wins in silence
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        verify(saved)


def test_files_outside_the_manifest_are_ignored(saved: Path) -> None:
    shutil.copy(saved / "W_enc_0.safetensors", saved / "W_enc_9.safetensors")
    (saved / "notes.txt").write_text("mine")
    verify(saved)
    assert load_clt(saved)[1].keys() == clt_tensors().keys()


def test_files_in_subdirectories_are_checked(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "c") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "x.txt").write_text("abc")
    flip(tmp_path / "c" / "sub" / "x.txt", 1)
    with pytest.raises(CheckpointError, match="sub/x.txt has changed bytes"):
        verify(tmp_path / "c")


def test_a_path_that_is_no_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        verify(tmp_path / "nowhere")
    with atomic_directory(tmp_path / "other"):
        pass
    with pytest.raises(CheckpointError, match="sparseclt.json is not part of this checkpoint"):
        load_clt(tmp_path / "other")
    with pytest.raises(CheckpointError, match="state.json is not part of this checkpoint"):
        load_state(tmp_path / "other")
    with pytest.raises(ValueError, match="is a file"), atomic_directory(saved / "config.yaml"):
        pass


def test_another_format_names_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as future:
        for module in (checkpoint, clt_files):
            future.setattr(module, "FORMAT_VERSION", 7)
        write(tmp_path / "c")
    for load in (load_clt, load_state):
        with pytest.raises(CheckpointError, match="version 7, expected 2: read it with"):
            load(tmp_path / "c")


def test_an_exception_inside_leaves_the_old_checkpoint_alone(saved: Path) -> None:
    before = (saved / "manifest.json").read_bytes()
    with pytest.raises(RuntimeError, match="disk full"), atomic_directory(saved) as directory:
        save_state(directory, {}, {"step": 1})
        raise RuntimeError("disk full")
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    assert (saved / "manifest.json").read_bytes() == before
    verify(saved)


class Died(BaseException):
    pass


def kill_before_call(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the process die before its n-th rename or removal: from then on no such call reaches the disk."""
    calls = 0

    def mortal(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls >= number:
                raise Died
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(directories.os, "rename", mortal(os.rename))
    monkeypatch.setattr(directories.shutil, "rmtree", mortal(shutil.rmtree))


# In order: removal of a stale .tmp, rename old aside, rename new in, removal of old.
@pytest.mark.parametrize(("call", "survivor"), [(2, "old"), (3, "old"), (4, "new")])
def test_a_crash_at_any_rename_leaves_one_checkpoint_findable(
    saved: Path, monkeypatch: pytest.MonkeyPatch, call: int, survivor: str
) -> None:
    write(saved, CONFIG | {"is": "old"})
    with monkeypatch.context() as dying:
        kill_before_call(dying, call)
        with pytest.raises(Died):
            write(saved, CONFIG | {"is": "new"})
    assert saved.exists() == (call != 3)
    found = latest(saved.parents[1])
    assert found is not None
    for path in (saved, found):
        verify(path)
        assert load_clt(path)[0]["is"] == survivor
        assert_same_bits(load_state(path)[0], state_tensors())

    write(saved, CONFIG | {"is": "next"})
    assert load_clt(saved)[0]["is"] == "next"
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_failing_write_after_a_crash_keeps_the_rescued_checkpoint(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as dying:
        kill_before_call(dying, 3)
        with pytest.raises(Died):
            write(saved)
    with pytest.raises(RuntimeError), atomic_directory(saved):
        raise RuntimeError
    assert saved.exists()
    verify(saved)


def test_a_failing_rename_puts_the_old_checkpoint_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def refuse_new(source: Path, target: Path) -> None:
        if source.suffix == ".tmp":
            raise OSError("no permission")
        rename(source, target)

    monkeypatch.setattr(directories.os, "rename", refuse_new)
    with pytest.raises(OSError, match="no permission"):
        write(saved)
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]
    verify(saved)


def test_everything_is_on_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(directories, "fsync", lambda path: synced.append(path.name))
    rename = os.rename

    def recorded_rename(source: Path, target: Path) -> None:
        synced.append("rename")
        rename(source, target)

    monkeypatch.setattr(directories.os, "rename", recorded_rename)
    with atomic_directory(tmp_path / "c") as directory:
        (directory / "sub").mkdir()
        (directory / "sub" / "x").write_text("x")
    assert set(synced[:-3]) == {"sub", "x", "manifest.json"}
    assert synced[-3:] == ["c.tmp", "rename", tmp_path.name]


def test_latest_skips_temporary_and_incomplete_checkpoints(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    checkpoints = tmp_path / "checkpoints"
    for step in (9, 100, 20):
        with atomic_directory(checkpoints / f"step_{step:08d}"):
            pass
    shutil.copytree(checkpoints / "step_00000100", checkpoints / "step_00000300.tmp")
    shutil.copytree(checkpoints / "step_00000009", checkpoints / "step_00000100.old")
    (checkpoints / "step_00000200").mkdir()
    assert latest(tmp_path) == checkpoints / "step_00000100"
    with atomic_directory(checkpoints / "step_100000000"):
        pass
    assert latest(tmp_path) == checkpoints / "step_100000000"


BAD_TENSORS = [
    ("unknown key 'mlp.0.bias'", {"mlp.0.bias": torch.zeros(1)}),
    ("unknown key 'mlp.00.W_enc'", {"mlp.00.W_enc": torch.zeros(1)}),
    ("unknown key 'W_enc'", {"W_enc": torch.zeros(1)}),
    ("must be torch.int32, got torch.int64", {"mlp.0.connections": torch.zeros(F, C, dtype=torch.int64)}),
    ("lacks attn.5.W_enc", {"attn.5.b_enc": torch.zeros(F)}),
    (r"W_dec'\] must be \[F, 3, D\]", {"mlp.0.W_dec": torch.zeros(F, 1, D)}),
    (
        r"without gaps, got \[0, 1, 2, 4\]",
        {f"mlp.4.{n}": torch.zeros(1) for n in ("W_enc", "b_enc", "W_dec", "b_dec")},
    ),
]


@pytest.mark.parametrize(("message", "change"), BAD_TENSORS, ids=[message for message, _ in BAD_TENSORS])
def test_tensors_outside_the_layout_are_refused_before_writing(tmp_path: Path, message: str, change: dict) -> None:
    with pytest.raises(ValueError, match=message):
        save_clt(tmp_path, CONFIG, clt_tensors() | change)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tensor_on_disk_is_refused(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "c") as directory:
        save_clt(directory, CONFIG, clt_tensors())
        os.replace(directory / "W_enc_1.safetensors", directory / "W_enc_0.safetensors")
    with pytest.raises(CheckpointError, match="W_enc_0.safetensors: unknown tensor"):
        load_clt(tmp_path / "c")


def test_values_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"numbers\['loss'\] must be finite"):
            save_state(tmp_path, {}, {"loss": value})
        with pytest.raises(ValueError, match="config must hold plain JSON values"):
            save_clt(tmp_path, CONFIG | {"loss": value}, clt_tensors())
    with pytest.raises(TypeError, match=r"numbers\['a'\] must be an int, a float or a str, got list"):
        save_state(tmp_path, {}, {"a": [1]})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"tensors\['a'\] must be a torch.Tensor, got int"):
        save_state(tmp_path, {"a": 1}, {})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match="config must hold plain JSON values"):
        save_clt(tmp_path, CONFIG | {"object": object()}, clt_tensors())
    with pytest.raises(ValueError, match='config must not have the key "format_version"'):
        save_clt(tmp_path, CONFIG | {"format_version": 3}, clt_tensors())
    with pytest.raises(ValueError, match='"model_name"'):
        save_clt(tmp_path, {}, clt_tensors())
