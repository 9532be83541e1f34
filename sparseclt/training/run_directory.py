"""The files of a training run: what it was trained on, its metrics, its checkpoints."""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from sparseclt.config import TrainConfig, to_dict
from sparseclt.connections.activity import Activity
from sparseclt.connections.policies import ConnectionPolicy
from sparseclt.data.tokens import rows_digest
from sparseclt.language_model.identity import tokenizer_digest
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model import pretrained
from sparseclt.model.clt import SparseCLT
from sparseclt.model.sites import Mode
from sparseclt.storage import checkpoint, clt_files
from sparseclt.storage.directories import CheckpointError, verify
from sparseclt.storage.json_files import read_json, replace_json
from sparseclt.storage.parts import Part, part, shared_directory
from sparseclt.storage.run_config import CHECKPOINTS, CLT, has_checkpoints, imported_input, write_config
from sparseclt.training.loggers import RunLog, truncate_after
from sparseclt.training.moment_axes import moment_axis
from sparseclt.training.optimizer import RowAdam

METRICS, IDENTITY = "metrics.jsonl", "identity.json"
NAMES = {
    "model": "model.path: the weights of the language model",
    "tokenizer": "model.path: the tokenizer's rules",
    "rows": "data.source: the rows of tokens",
}


class Identity(NamedTuple):
    """What a run was trained on, as digests: the model's weights, its tokenizer, the training rows."""

    model: str
    tokenizer: str
    rows: str | None

    @classmethod
    def of(cls, language_model: LanguageModel, rows: Tensor | None) -> "Identity":
        """That of a run on `rows` [R, S]; None: whichever they are."""
        text = None if rows is None else rows_digest(rows)
        return cls(language_model.digest(), tokenizer_digest(language_model.tokenizer), text)

    def check(self, found: Mapping[str, object], place: Path) -> None:
        """A ValueError that names what is not as in `found`, which `place` holds."""
        for name, digest in self._asdict().items():
            if digest is not None and digest != found.get(name):
                raise ValueError(
                    f"{NAMES[name]} are not those that {place} was trained on (digest {digest[:12]}, expected "
                    f"{str(found.get(name))[:12]}); give those, or start a new run"
                )


def write_identity(run: Path, identity: Identity) -> None:
    """Write down what the run in directory `run` is trained on."""
    replace_json(run / IDENTITY, identity._asdict())


def check_identity(run: Path, identity: Identity) -> None:
    """A ValueError if the run in directory `run` was trained on something else."""
    path = run / IDENTITY
    if not path.is_file():
        raise ValueError(f"run: expected {path}, which says what the run was trained on; restore it")
    identity.check(read_json(path), run)


def language_model_of(run: Path, config: TrainConfig) -> LanguageModel:
    """The language model of the run in directory `run`, loaded as `config` says. Raises ValueError for another model or
    tokenizer than the run was trained on."""
    model = LanguageModel.of(config)
    check_identity(run, Identity.of(model, rows=None))
    return model.reading(imported_input(run) or model.shape.mlp_input)


@contextmanager
def run_directory(run: Path, begun: Callable[[], bool]) -> Iterator[None]:
    """Make directory `run` if it is not there. If an error ends the block before the run has `begun`, what was made is
    removed again."""
    made = [path for path in (run, *run.parents) if not path.exists()]
    run.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except Exception:
        if made and not begun():
            shutil.rmtree(run, ignore_errors=True)
            with suppress(OSError):  # not empty: another run has begun there
                for parent in made[1:]:
                    parent.rmdir()
        raise


@contextmanager
def opened_run(
    run: Path, config: TrainConfig, identity: Identity, step: int, begun: Callable[[], bool]
) -> Iterator[RunLog]:
    """Make directory `run`, or take it up after `step` steps: its configuration and identity are written, and the log
    is open inside the block. `begun` as in `run_directory`."""
    with run_directory(run, begun):
        write_identity(run, identity)
        # Without the grid of ranks, which is another one when others go on.
        write_config(run, replace(config, parallel=replace(config.parallel, latents=None, data=None)))
        truncate_after(run / METRICS, step)
        with closing(RunLog(config.logging, run, to_dict(config), config.steps, step)) as log:
            yield log


def choose_checkpoint(run: Path, name: str | Path) -> Path:
    """Checkpoint `name` of the run in directory `run`, given as step_N or as a path. Raises CheckpointError if it is
    damaged, ValueError if it is none of this run's."""
    folder = run / CHECKPOINTS
    path = Path(name) if Path(name).parent.resolve() == folder.resolve() else folder / name
    if path.parent != folder and path.parent.resolve() != folder.resolve() or not path.is_dir():
        there = ", ".join(sorted(p.name for p in folder.glob("step_????????"))) or "none"
        raise ValueError(f"checkpoint: expected one of {folder} ({there}), got {name}")
    verify(path)
    return path


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint below `run`; None if the run never wrote one.

    Damaged ones are renamed, with a warning. Raises CheckpointError if that leaves none.
    """
    while (path := checkpoint.latest(run)) is not None:
        try:
            verify(path)
            return path
        except CheckpointError as error:
            aside = _set_aside(path, "damaged")
            warnings.warn(f"{error}; it is now {aside.name}, and the checkpoint before it is taken", stacklevel=2)
    if has_checkpoints(run):
        raise CheckpointError(f"resume: expected a whole checkpoint in {run / CHECKPOINTS}, found only damaged ones")
    return None


def steps_done(run: Path) -> int | None:
    """The step of the newest checkpoint below `run`, or None. Once that is the last one, clt/ is of that step."""
    path = checkpoint.latest(run)
    return None if path is None else int(path.name.removeprefix("step_").removesuffix(".old"))


def finished_clt(run: Path, steps: int) -> Path:
    """Where the CLT of a finished run of so many steps is. Raises ValueError if the run is not finished."""
    done, path = steps_done(run), run / CLT
    if not path.is_dir() or done is not None and done < steps:
        raise ValueError(
            f"run: expected a finished run, but {run} has saved {done or 0} of {steps} steps; finish it with sparseclt "
            f"resume, or choose one of its checkpoints"
        )
    return path


def set_later_aside(path: Path) -> None:
    """Rename the checkpoints that are newer than `path`, which training goes on from."""
    for later in path.parent.glob("step_????????"):
        if later.name > path.name:
            _set_aside(later, "superseded")


def _set_aside(path: Path, reason: str) -> Path:
    aside = path.with_name(f"{path.name}.{reason}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    return aside


class TrainingState:
    """All that changes while a CLT is trained, to be written as a checkpoint and read back exactly."""

    def __init__(
        self,
        clt: SparseCLT,
        optimizer: RowAdam,
        activity: Mapping[Mode, Activity],
        policy: ConnectionPolicy | None = None,
    ):
        self.clt, self.optimizer, self.activity, self.policy = clt, optimizer, activity, policy

    def tensors(self) -> dict[str, Tensor | Part]:
        """Everything beside the CLT, by name, to be saved or copied into."""
        group = self.clt.ranks.latents
        tensors = {
            f"optimizer/{name}": part(tensor, moment_axis(name), group)
            for name, tensor in self.optimizer.tensors().items()
        }
        for mode, activity in self.activity.items():
            tensors |= {f"activity/{mode}/{name}": tensor for name, tensor in activity.state().items()}
        policy = self.policy.state() if self.policy else {}
        return tensors | {f"policy/{name}": tensor for name, tensor in policy.items()}

    def save(self, run: Path, step: int, micro_rows: int, identity: Identity, keep: int) -> Path:
        """Write checkpoints/step_N of the run directory, whole or not at all, and keep only the `keep` newest ones."""
        folder, ranks = run / CHECKPOINTS, self.clt.ranks
        if ranks.first:
            folder.mkdir(exist_ok=True)  # without parents: a run directory that vanished is not made anew elsewhere
        path = folder / f"step_{step:08d}"
        with shared_directory(path, ranks) as directory:
            if directory is not None:
                pretrained.write(directory, self.clt)
                digests = {name: str(digest) for name, digest in identity._asdict().items()}
                numbers: dict[str, int | float | str] = {"step": step, "micro_rows": micro_rows, **digests}
                checkpoint.save_state(directory, self.tensors(), numbers, ranks.latents)
        if ranks.first:
            checkpoint.prune(run, keep)
        return path

    def load(self, path: Path, identity: Identity) -> tuple[int, int]:
        """Take up the checkpoint in directory `path`; returns its step and its rows in a micro-batch.

        Raises CheckpointError if it is damaged, ValueError if it was trained on something else.
        """
        saved, numbers = checkpoint.load_state(path)
        identity.check(numbers, path)
        pretrained.load_tensors(self.clt, clt_files.load_clt(path)[1])
        for name, tensor in self.tensors().items():
            saved.copy_into(name, tensor)
        self.optimizer.step = checkpoint.whole_number(path, numbers, "step", 0)
        return self.optimizer.step, checkpoint.whole_number(path, numbers, "micro_rows", 1)
