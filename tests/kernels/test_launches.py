"""Launches at the size of Gemma-2 2B with F 65,536, counted without running anything."""

import torch
from launches import counted
from torch import Tensor

from csrc_triton import connected_encode, launch, select_connections, topk_encode
from csrc_triton.launch import GPU_SHARE
from sparseclt.ops import scratch
from sparseclt.ops.scratch import default_scratch

N, D, F, K, C, L = 8192, 2304, 65_536, 64, 64, 26
S, U = (L - 1) * K, (L - 1) * F
SCRATCH = int(GPU_SHARE * (64 << 30))  # on a GPU with 64 GiB free


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def ids(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return meta(*shape, dtype=dtype)


def test_topk_encode():
    with counted() as launches:
        topk_encode.forward(meta(N, D), meta(F, D), meta(F), K, "topk", SCRATCH)
    assert 4 <= launches.total() <= 12, launches


def test_connected_encode():
    encoder = meta(N, D), meta(F, D), meta(F)
    upstream = (
        meta(N, S),
        ids(N, S),
        meta(F, C),
        ids(F, C),
        ids(F * C, dtype=torch.int32),
        ids(U + 1, dtype=torch.int32),
    )
    with counted() as launches:
        values, indices = connected_encode.forward(*encoder, *upstream, U, meta(N), K, SCRATCH)
    assert 8 <= launches.total() <= 40, launches
    rest = *encoder[:2], *upstream, U, meta(N), SCRATCH, [True] * 5
    with counted() as launches:
        connected_encode.backward(meta(N, K), values, indices, *rest)
    assert 8 <= launches.total() <= 60, launches


def test_select_connections():
    with counted() as launches:
        select_connections.forward(meta(1, F, D), meta(U, D), meta(U), C, SCRATCH)
    assert 100 <= launches.total() <= 2000, launches


def test_scratch_is_a_share_of_what_is_free_on_a_gpu(monkeypatch):
    free = {"mem_get_info": (60 << 30, 141 << 30), "memory_reserved": 8 << 30, "memory_allocated": 4 << 30}
    for name, value in free.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    gpu = torch.device("cuda")
    assert default_scratch("topk_encode", "triton", gpu) == launch.free_share(gpu) == SCRATCH
    assert launch.free_share(torch.device("cpu")) == launch.SCRATCH_BYTES
    planned = scratch.GPU_SHARE, scratch.GPU_PARTS_BYTES, scratch.GPU_READ_BYTES, scratch.SCRATCH_BYTES["triton"]
    assert planned == (GPU_SHARE, launch.PARTS_BYTES, connected_encode.READ_BYTES, launch.SCRATCH_BYTES)
