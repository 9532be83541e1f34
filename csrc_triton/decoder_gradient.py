"""The gradient of some rows of a decoder in one launch, and the sums of its squares without storing it.

dW[f, t] = sum over tokens n that have f of z[n, f] g[n, t]                   what the latents wrote to target t
         + sum over readers behind t of sum over i that read f of dV[i, c] W_enc[i]      what virtual weights read

A reader meets the sum of what a module wrote before it, so its part goes to all targets up to the one in front of it.
Passes and readers are many small tensors: the kernel gets a table of their addresses.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LaunchConfig, cdiv, launcher, pow2
from .transpose import Transpose


class Written(NamedTuple):
    """What the latents of a pass wrote: `values` [N, K], their slots by latent, the gradient of each target [N, D]."""

    values: Tensor
    by_latent: Transpose
    grads: Sequence[Tensor]


class Read(NamedTuple):
    """What one reader reads: dV [F, C], its connections by upstream latent, its encoder [F, D], and what is subtracted
    from each of its rows [F] (their means, where the model's norm centres), or None."""

    dV: Tensor
    by_upstream: Transpose
    W_enc: Tensor
    offsets: Tensor | None


@dataclass(frozen=True)
class RowTile(LaunchConfig):
    """Slots of a list and columns of a row that a program adds up at a time."""

    slots: int = 4  # lists are short
    columns: int = 256

    @property
    def constexprs(self) -> dict[str, int]:
        return {"SLOTS": self.slots, "COLUMNS": self.columns}


TILE = RowTile(num_warps=4)
ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
PER_READER = 8
# The table: the readers, 8 numbers each, then the passes. A reader: addresses of dV, order, starts, W_enc and offsets
# (0: none); F*C; C; U. All 0: no reader there. A pass: addresses of its values, order and starts; N*K; K; then those of
# its targets' gradients.


@triton.jit
def _address(table, place, KIND: tl.constexpr):
    return tl.load(table + place).to(tl.pointer_type(KIND))


@triton.jit
def _list(starts, id, total, count):
    """Where the list of `id`, one of `count`, begins and ends."""
    low = tl.load(starts + id + 1).to(tl.int64)
    high = tl.load(starts + id + 2, mask=id + 1 < count, other=0).to(tl.int64)
    return low, tl.where(id + 1 < count, high, total)


@triton.jit
def decoder_gradient_kernel(
    out,  # [R, T, D] fp32 (STORED)
    squares,  # [R, T, blocks] fp32 (not STORED)
    touched,  # [R] uint8: whether anything touches the row (STORED)
    table,  # [Q 8 + P (5 + T)] int64: the readers, of which that of target t meets the sum up to t, and the passes
    P, Q, T, F, D,
    row,  # the first row in the decoder
    first,  # its latent's id among the upstream latents of a reader
    STORED: tl.constexpr,
    OFFSETS: tl.constexpr,
    WEIGHT: tl.constexpr,  # element types: of values and dV,
    GRADIENT: tl.constexpr,  # gradients of targets,
    ENCODER: tl.constexpr,
    INDEX: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """One row and a block of its columns, from the last target to the first."""
    r = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < D
    behind = tl.zeros([SLOTS, COLUMNS], tl.float32)
    entries = tl.zeros((), tl.int64)
    passes = table + Q * 8
    for back in range(Q):
        t = Q - 1 - back
        reader = table + t * 8
        total = tl.load(reader + 5)
        if total > 0:
            dV = _address(reader, 0, WEIGHT)
            order = _address(reader, 1, INDEX)
            W_enc = _address(reader, 3, ENCODER)
            C = tl.load(reader + 6).to(INDEX)
            low, high = _list(_address(reader, 2, INDEX), first + r, total, tl.load(reader + 7))
            entries += high - low
            for start in range(low, high, SLOTS):
                slot = start + tl.arange(0, SLOTS)
                used = slot < high
                position = tl.load(order + slot, mask=used, other=0)
                weight = tl.load(dV + position, mask=used, other=0).to(tl.float32)
                i = (position // C).to(tl.int64)
                part = tl.load(
                    W_enc + i[:, None] * D + columns[None, :], mask=used[:, None] & inside[None, :], other=0
                ).to(tl.float32)
                if OFFSETS:
                    part -= tl.load(_address(reader, 4, tl.float32) + i, mask=used, other=0)[:, None]
                behind += weight[:, None] * part
        if t < T:
            sums = behind
            for p in range(P):
                written = passes + p * (5 + T)
                values = _address(written, 0, WEIGHT)
                order = _address(written, 1, INDEX)
                K = tl.load(written + 4).to(INDEX)
                bags = _address(written, 5 + t, GRADIENT)
                low, high = _list(_address(written, 2, INDEX), row + r, tl.load(written + 3), F)
                entries += high - low
                for start in range(low, high, SLOTS):
                    slot = start + tl.arange(0, SLOTS)
                    used = slot < high
                    position = tl.load(order + slot, mask=used, other=0)
                    weight = tl.load(values + position, mask=used, other=0).to(tl.float32)
                    bag = tl.load(
                        bags + (position // K).to(tl.int64)[:, None] * D + columns[None, :],
                        mask=used[:, None] & inside[None, :], other=0,
                    )  # fmt: skip
                    sums += weight[:, None] * bag.to(tl.float32)
            gradient = tl.sum(sums, 0)
            if STORED:
                tl.store(out + (r * T + t) * D + columns, gradient, mask=inside)
            else:
                square = tl.sum(tl.where(inside, gradient * gradient, 0.0), 0)
                tl.store(squares + (r * T + t) * tl.num_programs(1) + tl.program_id(1), square)
    if STORED:
        if tl.program_id(1) == 0:
            tl.store(touched + r, (entries > 0).to(tl.uint8))


class Decoder:
    """The gradient of one decoder [F, T, D]; its table of addresses is made once.

    `written`: every pass; `readers`: one entry per target, and maybe more, which meet the sum of all targets: the
    reader that meets the sum up to target t stands at t, None where there is none. `first`: id of the decoder's latent
    0 among the upstream latents of the readers. All tensors are on one device.
    """

    def __init__(
        self, shape: tuple[int, int, int], first: int, written: Sequence[Written], readers: Sequence[Read | None]
    ) -> None:
        self.F, self.T, self.D = shape
        self.first = first
        read = [reader for reader in readers if reader is not None]
        self._kept: list[Tensor] = []  # alive as long as their addresses are in use
        self.index = self._index_dtype([*(w.by_latent for w in written), *(r.by_upstream for r in read)])
        self.offsets = any(reader.offsets is not None for reader in read)
        self.weight = torch.float32
        if len(kinds := {w.values.dtype for w in written} | {r.dV.dtype for r in read}) == 1:
            (self.weight,) = kinds
        self.gradient = written[0].grads[0].dtype if written else torch.float32
        self.encoder = read[0].W_enc.dtype if read else torch.float32
        self.device = (written[0].values if written else read[0].dV).device
        passes = [self._pass(w) for w in written]
        rows = [self._reader(r) for r in readers] + [[0] * PER_READER] * (self.T - len(readers))
        self.sizes = len(passes), len(rows)
        self.table = self._on_device([number for row in (*rows, *passes) for number in row])

    @staticmethod
    def _index_dtype(transposes: Sequence[Transpose]) -> torch.dtype:
        wide = any(tensor.dtype == torch.int64 for transposed in transposes for tensor in transposed)
        return torch.int64 if wide else torch.int32

    def _at(self, tensor: Tensor, dtype: torch.dtype) -> int:
        tensor = tensor.detach().to(dtype).contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _pass(self, w: Written) -> list[int]:
        indices = [self._at(tensor, self.index) for tensor in w.by_latent]
        targets = [self._at(grad, self.gradient) for grad in w.grads]
        return [self._at(w.values, self.weight), *indices, w.values.numel(), w.values.shape[1], *targets]

    def _reader(self, r: Read | None) -> list[int]:
        if r is None or r.dV.numel() == 0:
            return [0] * PER_READER
        offsets = 0
        if self.offsets:
            none = r.dV.new_zeros(len(r.W_enc)) if r.offsets is None else r.offsets
            offsets = self._at(none, torch.float32)
        indices = [self._at(tensor, self.index) for tensor in r.by_upstream]
        W_enc = self._at(r.W_enc, self.encoder)
        upstream = len(r.by_upstream.starts) - 1
        return [self._at(r.dV, self.weight), *indices, W_enc, offsets, r.dV.numel(), r.dV.shape[1], upstream]

    def _on_device(self, numbers: list[int]) -> Tensor:
        table = torch.tensor(numbers, dtype=torch.int64)
        if self.device.type != "cuda":
            return table.to(self.device)
        return table.pin_memory().to(self.device, non_blocking=True)  # does not wait for the device

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """The gradient of some rows, [R, T, D] fp32, and whether anything touches them, boolean [R]."""
        size = rows.stop - rows.start
        out = torch.empty(size, self.T, self.D, dtype=torch.float32, device=self.device)
        touched = torch.empty(size, dtype=torch.uint8, device=self.device)
        self._launch((out, out, touched), rows.start, size, stored=True)
        return out, touched.view(torch.bool)

    def squares(self) -> Tensor:
        """[T]: the sums of squares of the whole gradient, by target."""
        blocks = cdiv(self.D, self._tile.columns)
        squares = torch.empty(self.F, self.T, blocks, dtype=torch.float32, device=self.device)
        self._launch((squares, squares, squares), 0, self.F, stored=False)
        return squares.sum((0, 2))

    @property
    def _tile(self) -> RowTile:
        return RowTile(TILE.num_warps, columns=pow2(self.D, 16, TILE.columns))

    def _launch(self, outputs: tuple[Tensor, Tensor, Tensor], row: int, size: int, stored: bool) -> None:
        if size:
            _decoder_gradient(
                self.table, outputs, size,
                (*self.sizes, self.T, self.F, self.D, row, self.first + row), self._tile,
                {
                    "STORED": stored, "OFFSETS": self.offsets, "WEIGHT": ELEMENTS[self.weight],
                    "GRADIENT": ELEMENTS[self.gradient], "ENCODER": ELEMENTS[self.encoder],
                    "INDEX": tl.int64 if self.index == torch.int64 else tl.int32,
                },
            )  # fmt: skip


@launcher
def _decoder_gradient(
    table: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    size: int,
    numbers: tuple[int, ...],
    tile: RowTile,
    flags: dict[str, object],
) -> None:
    D = numbers[4]
    decoder_gradient_kernel[size, cdiv(D, tile.columns)](
        *outputs, table, *numbers, **flags, **tile.constexprs, **tile.options
    )
