"""The activations of all training rows on disk, so that the language model runs over them once.

A cache is a directory: `cache.json` says what it holds, each `shard_NNNNN` has the activations of some rows, in the
order of the rows, and `complete` appears once the last shard is there. The last two are directories of
`storage.directories`: they appear whole or not at all, with the digests of their files. The cache itself is only added
to, never renamed, so it may be a mount point.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparseclt.config import TrainConfig
from sparseclt.data.activation_stream import as_activations, vectors_of
from sparseclt.data.tokens import rows_digest
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.activations import Activations, all_but_first
from sparseclt.model.shape import ModelShape
from sparseclt.storage.directories import CheckpointError, atomic_directory, verify
from sparseclt.storage.json_files import read_json, replace_json
from sparseclt.storage.safetensors_stream import TensorFiles, save_file, stored_names

FORMAT_VERSION = 1
SHARD_BYTES = 256 << 20
INFO, SHARD, COMPLETE = "cache.json", "activations.safetensors", "complete"


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds; two caches with the same are the same."""

    format_version: int
    rows: int  # R
    row_length: int  # S
    row_digest: str  # of the token ids, in the order of the rows
    model_digest: str  # of the language model's weights
    model: ModelShape  # without its name: the same model may be found under several
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row on disk: token ids, vectors (int8: with a scale each), and the norms' scales."""
        L, D = self.model.layers, self.model.d_model
        vector = D + 4 if self.dtype == "int8" else 2 * D
        return self.row_length * (4 + (1 + 3 * L) * vector + 4 * L)

    @property
    def shard_rows(self) -> int:
        return min(self.rows, max(1, SHARD_BYTES // self.row_bytes))

    @property
    def shards(self) -> int:
        return -(-self.rows // self.shard_rows)


def open_cache(config: TrainConfig, language_model: LanguageModel, rows: Tensor) -> "ActivationCache":
    """The cache `config.activations.cache` of `rows` [R, S]; missing parts are captured and written first.

    Raises ValueError if the directory holds anything else or the disk is too full, CheckpointError if it is damaged.
    One writer at a time.
    """
    directory = Path(str(config.activations.cache)).expanduser()
    info = cache_info(language_model, rows, config.activations.cache_dtype)
    _check_info(directory, info)
    if not (directory / COMPLETE).is_dir():
        _write(directory, info, language_model.capture, rows, config)
    return ActivationCache(directory, info, rows)


def cache_info(language_model: LanguageModel, rows: Tensor, dtype: str) -> CacheInfo:
    """What a cache of `language_model` on `rows` holds."""
    return CacheInfo(
        format_version=FORMAT_VERSION,
        rows=len(rows),
        row_length=rows.shape[1],
        row_digest=rows_digest(rows),
        model_digest=language_model.digest(),
        model=replace(language_model.shape, name=""),
        dtype=dtype,
    )


def quantise(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """float32 vectors [..., D] as int8 [..., D] and their scales [...]: the largest entry of a vector is 127 scales."""
    scales = vectors.abs().amax(-1) / 127
    steps = vectors / scales[..., None].clamp_min(torch.finfo(torch.float32).tiny)
    return steps.round_().to(torch.int8), scales


class ActivationCache:
    """The activations of rows [R, S], read from a complete cache."""

    def __init__(self, directory: Path, info: CacheInfo, rows: Tensor):
        self.directory, self.info, self.rows = directory, info, rows
        self._shards: dict[int, dict[str, Any]] = {}

    def read(self, chosen: Tensor, device: torch.device | str = "cpu") -> Activations:
        """The activations, in float32, of rows `chosen` [B]: B is any number, the rows any rows.

        Raises CheckpointError, naming the file, if a shard that was not read before is damaged.
        """
        info, B = self.info, len(chosen)
        tokens = torch.empty(B, info.row_length, dtype=torch.int64)
        vectors = torch.empty(1 + 3 * info.model.layers, B, info.row_length, info.model.d_model)
        vector_scales = torch.ones(vectors.shape[:3])
        scale = torch.empty(info.model.layers, B, info.row_length)
        for place in chosen.argsort().tolist():  # shard after shard, and forwards in each
            number, row = divmod(int(chosen[place]), info.shard_rows)
            shard = self._shard(number)
            tokens[place] = shard["tokens"][row]
            vectors[:, place] = shard["vectors"][row]
            scale[:, place] = shard["scale"][row]
            if info.dtype == "int8":
                vector_scales[:, place] = shard["vector_scales"][row]
        if not torch.equal(tokens, self.rows[chosen].long()):
            raise CheckpointError(
                f"activations.cache: expected the training rows in the order of {self.directory / INFO}, but its "
                f"shards hold others; remove {self.directory} to capture them anew"
            )
        if info.dtype == "int8":
            vectors *= vector_scales[..., None]
        tokens = tokens.to(device)
        return as_activations(tokens, vectors.to(device), scale.to(device), all_but_first(tokens))

    def _shard(self, number: int) -> dict[str, Any]:
        if number not in self._shards:
            path = self.directory / _name(number)
            _verify(path, self.directory)
            self._shards[number] = self._slices(path / SHARD, number)
        return self._shards[number]

    def _slices(self, file: Path, number: int) -> dict[str, Any]:
        """The parts of a shard, to be read row by row, in the shapes that this cache's shards have."""
        rows = min(self.info.shard_rows, self.info.rows - number * self.info.shard_rows)
        expected = _room(self.info, rows, "meta")
        stored = TensorFiles({name: (file, name) for name in stored_names(file)})
        for name, tensor in expected.items():
            stored.check(name, [tensor.dtype], tensor.shape)
        opened = safe_open(file, framework="pt")
        return {name: opened.get_slice(name) for name in expected}


def _name(shard: int) -> str:
    return f"shard_{shard:05d}"


def _verify(path: Path, directory: Path) -> None:
    try:
        verify(path)
    except CheckpointError as error:
        raise CheckpointError(
            f"activations.cache: {error}; or remove {directory} to capture the activations anew"
        ) from error


def _check_info(directory: Path, info: CacheInfo) -> None:
    """Refuse a directory that holds something other than `info` says."""
    fresh = {"lost+found", f"{INFO}.tmp"}  # of a new file system, and of a first write that was cut short
    if not directory.exists() or directory.is_dir() and {path.name for path in directory.iterdir()} <= fresh:
        return
    if not (directory / INFO).is_file():
        raise ValueError(
            f"activations.cache: expected a cache of activations or an empty or absent directory, got {directory}, "
            f"which has no {INFO}; choose another one"
        )
    found, expected = _flat(_read_info(directory)), _flat(asdict(info))
    for name in expected | found:
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"activations.cache: expected {name} {expected.get(name)}, but {directory} has {found.get(name)}: it "
                f"is of other rows, another model or dtype, or damaged; choose another directory"
            )


def _read_info(directory: Path) -> dict[str, Any]:
    try:
        return read_json(directory / INFO)
    except CheckpointError as error:
        raise CheckpointError(f"activations.cache: {error}; or remove {directory}") from error


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """With the fields of `model` beside the others, as "model.layers" and so on."""
    model = values.get("model")
    if not isinstance(model, dict):
        return values
    return {name: value for name, value in values.items() if name != "model"} | {
        f"model.{name}": value for name, value in model.items()
    }


def _write(
    directory: Path, info: CacheInfo, capture: Callable[[Tensor], Activations], rows: Tensor, config: TrainConfig
) -> None:
    """Capture and write the shards that are missing."""
    from tqdm import tqdm

    shards = {number: rows[number * info.shard_rows :][: info.shard_rows] for number in range(info.shards)}
    missing = {number: part for number, part in shards.items() if not (directory / _name(number)).is_dir()}
    to_do = sum(len(part) for part in missing.values())
    _check_space(directory, to_do * info.row_bytes)
    if not (directory / INFO).exists():
        directory.mkdir(parents=True, exist_ok=True)
        replace_json(directory / INFO, asdict(info))
    bar = tqdm(
        total=info.rows, initial=info.rows - to_do, desc="capturing", unit="row", disable=not config.logging.progress
    )  # fmt: skip
    with bar:
        for number, part in missing.items():
            tensors = _room(info, len(part))
            for start in range(0, len(part), config.batch_rows):
                piece = part[start : start + config.batch_rows]
                _put(tensors, start, capture(piece))
                bar.update(len(piece))
            with atomic_directory(directory / _name(number)) as new:
                save_file(tensors, new / SHARD)
    with atomic_directory(directory / COMPLETE):
        pass


def _room(info: CacheInfo, rows: int, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a shard, unfilled: all that a row has lies together."""
    empty = partial(torch.empty, device=device)
    parts = (rows, 1 + 3 * info.model.layers, info.row_length)
    tensors = {
        "tokens": empty(rows, info.row_length, dtype=torch.int32),
        "vectors": empty(*parts, info.model.d_model, dtype=torch.int8 if info.dtype == "int8" else torch.bfloat16),
        "scale": empty(rows, info.model.layers, info.row_length),
    }
    return tensors | ({"vector_scales": empty(parts)} if info.dtype == "int8" else {})


def _put(tensors: dict[str, Tensor], start: int, piece: Activations) -> None:
    rows = slice(start, start + len(piece.tokens))
    tensors["tokens"][rows] = piece.tokens
    for layer, scale in enumerate(piece.scale):
        tensors["scale"][rows, layer] = scale
    for i, vectors in enumerate(vectors_of(piece)):
        if "vector_scales" in tensors:
            tensors["vectors"][rows, i], tensors["vector_scales"][rows, i] = quantise(vectors.float())
        else:
            tensors["vectors"][rows, i] = vectors


def _check_space(directory: Path, needed: int) -> None:
    """Refuse to begin what does not fit on the disk."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ValueError(
            f"activations.cache: {directory} needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free "
            f"there; choose another directory, cache_dtype int8, or less text (data.max_tokens)"
        )
