"""The configuration in a run directory: which one a run has, and what may still change about it."""

from pathlib import Path
from typing import Any

from sparseclt.config import TrainConfig, from_dict, to_dict
from sparseclt.config.strict import ConfigError
from sparseclt.storage.json_files import read_json, replace_json

CONFIG, CLT, CHECKPOINTS, IMPORTED = "config.json", "clt", "checkpoints", "imported.json"
# Text and model may have moved: digests say whether they are still the same.
FREE = (
    "out",
    "steps",
    "device",
    "logging.",
    "checkpoints.",
    "compute.",
    "parallel.",
    "model.path",
    "data.source",
    "data.cache",
)


def read_config(run: str | Path) -> TrainConfig:
    """The configuration that a run directory was trained with."""
    path = Path(run) / CONFIG
    if not path.is_file():
        raise ValueError(f"run: expected a run directory with config.json, got {run}")
    try:
        return from_dict(read_json(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: " + f"\n{path}: ".join(str(error).splitlines())) from error


def write_config(run: Path, config: TrainConfig) -> None:
    """Write `config` into the run directory, in the place of what it had."""
    replace_json(run / CONFIG, to_dict(config))


def note_import(run: Path, source: str | Path, mlp_input: str) -> None:
    """Write down that the CLT of the run in directory `run` was trained by another tool, came from `source`, and reads
    the hook `mlp_input`."""
    noted = {"source": str(Path(source).resolve()), "mlp_input": mlp_input}
    replace_json(run / IMPORTED, noted)


def imported_input(run: str | Path) -> str | None:
    """The hook that the imported CLT of the run in directory `run` reads; None: it was trained here."""
    path = Path(run) / IMPORTED
    return str(read_json(path).get("mlp_input")) if path.exists() else None


def check_trained(run: str | Path) -> None:
    """A ValueError if the CLT of the run in directory `run` was imported: there is no training to go on with, or to
    repeat."""
    if imported_input(run) is not None:
        raise ValueError(f"run: expected one that was trained here, but the CLT in {run} was imported")


def has_checkpoints(run: Path) -> bool:
    """Whether a run got as far as a checkpoint, whatever has become of it since."""
    return any(not path.name.endswith(".tmp") for path in (run / CHECKPOINTS).glob("step_*"))


def check_unused(out: str | Path) -> None:
    """A ValueError if a run in directory `out` would overwrite another one. A run that stopped before its first
    checkpoint left nothing to lose, and is begun again."""
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a directory or a name that is free, but {out} is a file")
    if (out / CONFIG).exists() and ((out / CLT).exists() or has_checkpoints(out)):
        raise ValueError(f"out: {out} already holds a run; choose another directory, or resume it")


def check_changes(stored: TrainConfig, config: TrainConfig, run: str | Path) -> None:
    """A ValueError that names the fields in which `config` would change what the run in directory `run` trains."""
    problems = [
        f"{name} ({old!r} there, now {new!r})"
        for name, (old, new) in changed_fields(stored, config).items()
        if not name.startswith(FREE) and not (name == "activations.cache" and old and new)
    ]
    if problems:
        raise ValueError(
            f"resume: these options change what {run} trains: {', '.join(problems)}; leave them as they were, or start "
            f"a new run"
        )


def changed_fields(a: TrainConfig, b: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ, as "connections.per_latent", with both values."""
    left, right = _flat(to_dict(a)), _flat(to_dict(b))
    return {name: (left[name], right[name]) for name in left if left[name] != right[name]}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
