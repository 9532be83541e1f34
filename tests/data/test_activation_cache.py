"""The cache on disk: what comes back, that the model stays idle, and that nothing half-written or damaged is read."""

import errno
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from clts import language_model
from test_activation_stream import cut_off
from test_trainer import ROWS, trainer, whole_state
from tiny_models import LAYERS, WIDTH, hf_model, tokenizer

from sparseclt.config import ActivationConfig, LoggingConfig, TrainConfig
from sparseclt.data import activation_cache
from sparseclt.data.activation_cache import ActivationCache, cache_info, open_cache, quantise
from sparseclt.data.activation_stream import token_bytes, vectors_of
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.storage.directories import CheckpointError, atomic_directory
from sparseclt.storage.safetensors_stream import save_file
from sparseclt.training.finite import NonFiniteError

DTYPES = ("bf16", "int8")
SHARD_ROWS = 7  # of 30: four whole shards and one of two rows


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", torch.float32)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, model):
    row_bytes = cache_info(model, ROWS, "bf16").row_bytes
    monkeypatch.setattr(activation_cache, "SHARD_BYTES", SHARD_ROWS * row_bytes)


def opened(directory: Path, model, rows=ROWS, dtype="bf16") -> ActivationCache:
    activations = ActivationConfig(cache=str(directory), cache_dtype=dtype)
    return open_cache(
        TrainConfig(batch_rows=2, logging=LoggingConfig(progress=False), activations=activations), model, rows
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory, model) -> Path:
    """A complete cache in bf16, to copy."""
    directory = tmp_path_factory.mktemp("caches") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activation_cache, "SHARD_BYTES", SHARD_ROWS * cache_info(model, ROWS, "bf16").row_bytes)
        opened(directory, model)
    return directory


@pytest.fixture
def cache(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "cache"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


class Idle:
    """A language model that may be looked at but not run."""

    def __init__(self, model):
        self.shape, self.bridge, self.tokenizer, self.digest = model.shape, model.bridge, model.tokenizer, model.digest

    def capture(self, *arguments, **keywords):
        raise AssertionError("the language model ran")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_come_back_in_any_order_within_the_rounding_of_the_dtype(tmp_path, model, dtype):
    cache = opened(tmp_path / "cache", model, dtype=dtype)
    chosen = torch.tensor([29, 3, 7, 3, 14, 28, 0])
    got, real = cache.read(chosen), model.capture(ROWS[chosen])
    assert got.tokens.equal(real.tokens) and torch.allclose(torch.stack(got.scale), torch.stack(real.scale))
    for a, b in zip(vectors_of(got), vectors_of(real), strict=True):
        half_step = b.abs() * 2**-8 if dtype == "bf16" else b.abs().amax(-1, keepdim=True) / 254
        assert a.dtype == torch.float32 and ((a - b).abs() <= 1.01 * half_step + 1e-6).all()
        assert not a.equal(b)
    assert not got.attn_pattern and len(got.x) == LAYERS


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cache_takes_the_bytes_that_were_foretold_in_shards_of_bounded_size(tmp_path, model, dtype):
    cache = opened(tmp_path / "cache", model, dtype=dtype)
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.safetensors")]
    assert len(sizes) == cache.info.shards > 1 and max(sizes) < activation_cache.SHARD_BYTES + 1000
    assert 0 < sum(sizes) - len(ROWS) * cache.info.row_bytes < 1000 * len(sizes)


def test_int8_keeps_the_largest_entry_zeros_and_what_is_not_finite():
    vectors = torch.tensor([[1.0, -254.0, 2.0], [0.0, 0.0, 0.0], [1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0]])
    steps, scales = quantise(vectors)
    back = steps * scales[:, None]
    assert back[:2].tolist() == [[0.0, -254.0, 2.0], [0.0, 0.0, 0.0]]
    assert not back[2:].isfinite().all(1).any()


@pytest.mark.parametrize("shuffle_bytes", [0, 9 * 24 * token_bytes(LAYERS, WIDTH)])
def test_training_from_a_cache_never_runs_the_model_and_repeats_and_resumes_to_the_bit(tmp_path, model, shuffle_bytes):
    changes = {"activations": ActivationConfig(shuffle_bytes, str(tmp_path / "cache"), "int8")}
    first = trainer(tmp_path / "first", model, **changes)
    first.fit()
    again = trainer(tmp_path / "again", Idle(model), **changes)
    again.fit()
    cut_off(tmp_path / "cut", Idle(model), 5, **changes)
    resumed = trainer(tmp_path / "cut", Idle(model), **changes)
    resumed.fit(resume=tmp_path / "cut")
    for other in (again, resumed):
        expected, got = whole_state(first), whole_state(other)
        assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_captured_value_that_is_not_finite_still_stops_training(tmp_path, model, monkeypatch, dtype):
    capture = model.capture

    def poisoned(tokens, **keywords):
        activations = capture(tokens, **keywords)
        activations.mlp_out[1][0, 3, 2] = float("inf")
        return activations

    monkeypatch.setattr(model, "capture", poisoned)
    t = trainer(tmp_path / "run", model, activations=ActivationConfig(cache=str(tmp_path / "c"), cache_dtype=dtype))
    with pytest.raises(NonFiniteError, match="the model's mlp_out of layer 1 has NaN or Inf"):
        t.fit()


@pytest.mark.parametrize("stop", [2, 9])  # captures of two rows: within the first and the third shard
def test_writing_that_was_interrupted_goes_on_where_it_stopped(tmp_path, model, written, monkeypatch, stop):
    capture, calls, cache = model.capture, [], tmp_path / "cache"

    def interrupted(tokens, **keywords):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(tokens)
        return capture(tokens, **keywords)

    monkeypatch.setattr(model, "capture", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(cache, model)
    assert not (cache / "complete").exists()
    done = len(list(cache.glob("shard_?????")))
    assert done == stop // 4  # captures of a shard
    calls.clear()
    stop = -1
    opened(cache, model)
    assert sum(map(len, calls)) == len(ROWS) - done * SHARD_ROWS
    assert contents(cache) == contents(written)


def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "missing":
        file.unlink()
    elif how == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[-5] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "truncated", "flipped"])
def test_a_damaged_shard_is_an_error_that_names_it(cache, model, how):
    damage(cache / "shard_00002" / "activations.safetensors", how)
    opened_cache = opened(cache, Idle(model))
    opened_cache.read(torch.tensor([0, 29]))
    with pytest.raises(CheckpointError, match="activations.cache: .*shard_00002/activations.safetensors"):
        opened_cache.read(torch.tensor([0, 15]))


def test_a_shard_that_is_gone_from_a_complete_cache_is_an_error_that_names_it(cache, model):
    shutil.rmtree(cache / "shard_00001")
    with pytest.raises(CheckpointError, match="activations.cache: .*shard_00001"):
        opened(cache, Idle(model)).read(torch.tensor([8]))


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"rows": 30', '"rows": 31', "expected rows 30, but .* has 31: .* or damaged; choose another directory"),
        ('"model": {', '"model": {"layers": 1, ', "cache.json is damaged .the key 'layers' comes twice"),
        ('"dtype"', '"dtyp\0"', "cache.json is damaged .Invalid control character"),
        ('"bf16"\n}', '"bf16"\n', "cache.json is damaged"),
    ],
    ids=["value", "key twice", "control character", "cut off"],
)
def test_a_changed_description_is_an_error_that_names_it(cache, model, before, after, message):
    file = cache / "cache.json"
    assert before in file.read_text()
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(ValueError, match=f"activations.cache: .*{message}"):
        opened(cache, Idle(model))


def mounted(directory: Path, monkeypatch) -> None:
    """Refuse to rename or remove `directory`, as the kernel does for a mount point."""
    directory.mkdir()
    rename, rmdir = os.rename, os.rmdir

    def busy(*paths, **keywords):
        if directory.resolve() in [Path(path).resolve() for path in paths]:
            raise OSError(errno.EBUSY, "Device or resource busy", str(directory))
        return (rename if len(paths) == 2 else rmdir)(*paths, **keywords)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(os, "replace", busy)
    monkeypatch.setattr(os, "rmdir", busy)


@pytest.mark.parametrize("inside", [[], ["lost+found"], ["cache.json.tmp"]], ids=str)
def test_a_cache_may_be_a_mount_point(tmp_path, model, written, monkeypatch, inside):
    cache = tmp_path / "cache"
    mounted(cache, monkeypatch)
    for name in inside:
        (cache / name).mkdir() if name == "lost+found" else (cache / name).write_text("half")
    opened(cache, model)
    assert contents(cache) == contents(written)
    opened(cache, Idle(model)).read(torch.tensor([0, 29]))


@pytest.mark.skipif(not shutil.which("mount") or os.geteuid() != 0, reason="only root may mount")
def test_a_cache_on_a_real_mount_point(tmp_path, model, written):
    cache = tmp_path / "cache"
    cache.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(cache)], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"this machine does not let root mount: {mount.stderr}")
    try:
        opened(cache, model)
        assert contents(cache) == contents(written)
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_a_shard_of_other_shapes_is_an_error_that_names_it(cache, model):
    shard = cache / "shard_00001"
    with atomic_directory(shard) as directory:
        save_file({"tokens": torch.zeros(2, 12, dtype=torch.int32)}, directory / "activations.safetensors")
    with pytest.raises(CheckpointError, match=r"shard_00001/activations.safetensors: tokens has shape \[2, 12\]"):
        opened(cache, Idle(model)).read(torch.tensor([8]))


def test_shards_that_changed_places_are_noticed(cache, model):
    (cache / "shard_00000").rename(cache / "shard_x")
    (cache / "shard_00001").rename(cache / "shard_00000")
    (cache / "shard_x").rename(cache / "shard_00001")
    with pytest.raises(CheckpointError, match="activations.cache: expected the training rows in the order of"):
        opened(cache, Idle(model)).read(torch.tensor([0]))


def others(model):
    def wrapped(**keywords):
        hf = hf_model("gpt2", dtype=torch.float32, **keywords)
        return LanguageModel.from_hf(hf, tokenizer(), name="gpt2")

    fewer = SimpleNamespace(shape=replace(model.shape, layers=1), digest=model.digest)
    return {
        "row_digest": {"model": model, "rows": ROWS.flip(0)},
        "rows": {"model": model, "rows": ROWS[:20]},
        "model_digest": {"model": wrapped(seed=7)},
        "model.layers": {"model": fewer},
        "dtype": {"model": model, "dtype": "int8"},
        None: {"model": wrapped()},  # the same model, built anew
    }


def test_a_cache_of_anything_else_is_refused_by_name_and_left_alone(cache, model):
    before = contents(cache)
    for name, changes in others(model).items():
        if name is None:
            opened(cache, **changes)
            continue
        with pytest.raises(ValueError, match=f"activations.cache: expected {name} .* choose another directory"):
            opened(cache, **changes)
    assert contents(cache) == before


def test_a_directory_of_other_files_is_refused_and_left_alone(tmp_path, model):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="activations.cache: expected a cache of activations or an empty"):
        opened(tmp_path, model)
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


def test_a_full_disk_is_refused_before_anything_is_captured(tmp_path, model, monkeypatch):
    needed = len(ROWS) * cache_info(model, ROWS, "bf16").row_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(ValueError, match="activations.cache: .* needs .* GiB are free there; choose another"):
        opened(tmp_path / "cache", Idle(model))
    assert not contents(tmp_path)


def test_a_cache_says_what_it_holds(written):
    info = json.loads((written / "cache.json").read_text())
    assert (info["rows"], info["row_length"], info["model"]["layers"], info["model"]["d_model"]) == (
        30,
        12,
        LAYERS,
        WIDTH,
    )
