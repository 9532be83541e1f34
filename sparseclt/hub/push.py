"""The CLT of a finished run, uploaded with a card that shows its evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from sparseclt.config import to_dict
from sparseclt.evaluation import report
from sparseclt.model.clt import SparseCLT
from sparseclt.model.shape import Architecture
from sparseclt.storage.json_files import read_json
from sparseclt.storage.run_config import read_config
from sparseclt.training.run_directory import finished_clt

CONFIG, EVALUATION = "config.json", "evaluation.json"  # as they are called in a run directory


def push_run(run: str | Path, repo_id: str, **options: Any) -> str:
    """Upload the CLT of the finished run in directory `run` to `repo_id` ("owner/name") on the hub, with a model card,
    its configuration and its evaluation; returns the address of the commit.

    options: those of `SparseCLT.push_to_hub`. Raises ValueError for a run that is not finished or not evaluated.
    """
    clt, card = _material(Path(run))
    return clt.push_to_hub(repo_id, **card, **options)


def write_upload(run: str | Path, repo_id: str, out: str | Path) -> Path:
    """Write what `push_run` would upload to directory `out`. Errors are those of `push_run`."""
    clt, card = _material(Path(run))
    return clt.save_pretrained(out, model_card_kwargs={"repo_id": repo_id, **card})


def _material(run: Path) -> tuple[SparseCLT, dict[str, Any]]:
    config = read_config(run)
    path = finished_clt(run, config.steps)
    if not (run / EVALUATION).is_file():
        raise ValueError(f"run: expected an evaluated run, but {run} has no {EVALUATION}; run sparseclt eval {run}")
    evaluation = read_json(run / EVALUATION)
    files = {CONFIG: _text(_without_folders(to_dict(config))), EVALUATION: _text(evaluation)}
    clt = SparseCLT.from_pretrained(path)
    clt.architecture = Architecture.from_dict(_without_folders(clt.architecture.to_dict()))
    return clt, {"table": report.evaluation_table(evaluation), "files": files}


def _without_folders(value: Any) -> Any:
    """Plain values with the last name of absolute paths only: the others say how a machine is laid out."""
    if isinstance(value, dict):
        return {name: _without_folders(part) for name, part in value.items()}
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"
