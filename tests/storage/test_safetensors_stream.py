"""safetensors files written in pieces and read a tensor at a time: the same bytes, without a copy of a model."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from sparseclt.storage import safetensors_stream
from sparseclt.storage.safetensors_stream import NAMES, TensorFiles, save_file, stored_names

MEBIBYTE = 1 << 20


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("piece", [5, 64, 1 << 20])
def test_any_reader_reads_back_what_was_written(tmp_path, monkeypatch, dtype, piece):
    monkeypatch.setattr(safetensors_stream, "PIECE_BYTES", piece)
    whole = torch.arange(210).view(5, 6, 7) % 2 if dtype == torch.bool else torch.arange(210).view(5, 6, 7)
    whole = whole.to(dtype)
    tensors = {
        "whole": whole, "transposed": whole.transpose(0, 2), "strided": whole[:, ::2, 1], "scalar": whole[1, 1, 1],
        "empty": whole[:0], "expanded": whole[0, 0, :1].expand(9),
    }  # fmt: skip
    file = tmp_path / "x.safetensors"
    save_file(tensors, file)
    back, lazily = load_file(file), TensorFiles({name: (file, name) for name in stored_names(file)})
    assert set(back) == set(lazily) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor)
        assert torch.equal(lazily[name], tensor)


def test_a_dtype_without_a_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="complex64"):
        save_file({"x": torch.zeros(2, dtype=torch.complex64)}, tmp_path / "x.safetensors")


SCRIPT = """
import resource, sys, torch
from pathlib import Path
from sparseclt.storage import checkpoint
from sparseclt.storage.directories import atomic_directory
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder, what = Path(sys.argv[1]), sys.argv[2]
tensors = {f"t{i}": torch.full((1 << 18, 48), float(i)).T for i in range(6)}  # views: the library takes none
if what == "save":
    checkpoint.save_state(folder, {"t0": tensors["t0"][:1]}, {})
    before = peak()
    checkpoint.save_state(folder, tensors, {})
else:
    with atomic_directory(folder / "c") as directory:
        checkpoint.save_state(directory, tensors, {})
    before = peak()
    stored, _ = checkpoint.load_state(folder / "c")
    for name, tensor in tensors.items():
        tensor.copy_(stored[name])
print(peak() - before)
"""


@pytest.mark.parametrize("what", ["save", "load"])
def test_saving_and_loading_take_at_most_one_tensor_more(tmp_path, what):
    run = [sys.executable, "-c", SCRIPT, str(tmp_path), what]
    extra = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert extra <= 64 * MEBIBYTE, f"{extra / MEBIBYTE:.0f} MiB beside tensors of 48 MiB each"
