"""Going on with a run: moved, extended, interrupted, damaged, or on something that it was not trained on."""

import os
import shutil
import signal
import threading

import pytest
import torch
from clts import language_model
from test_trainer import ROWS, config, trainer, whole_state
from tiny_models import hf_model, tokenizer

from sparseclt.config import CheckpointConfig, ComputeConfig, LoggingConfig
from sparseclt.language_model.identity import tokenizer_digest
from sparseclt.language_model.language_model import LanguageModel
from sparseclt.model.clt import SparseCLT
from sparseclt.storage.checkpoint import latest
from sparseclt.storage.directories import CheckpointError
from sparseclt.storage.run_config import read_config
from sparseclt.training.finite import NonFiniteError
from sparseclt.training.interruption import Interrupted
from sparseclt.training.loggers import read_metrics
from sparseclt.training.trainer import Trainer

OFTEN = {"steps": 6, "checkpoints": CheckpointConfig(every_steps=2)}


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", torch.float32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """A run of 6 steps that was never interrupted, and its trainer."""
    out = tmp_path_factory.mktemp("finished") / "run"
    t = trainer(out, model, **OFTEN)
    t.fit()
    return out, t


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture
def usual_handlers():
    """As in a program begun in the foreground, whatever the tests were begun in."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def at_step(t: Trainer, step: int, act) -> Trainer:
    """Does `act` in the middle of step `step`."""
    original = t.train_step

    def train_step(activations):
        if t.step == step:
            act()
        return original(activations)

    t.train_step = train_step
    return t


def stop():
    raise KeyboardInterrupt


def cut_off(out, model, step: int, **changes) -> None:
    with pytest.raises(KeyboardInterrupt):
        at_step(trainer(out, model, **changes), step, stop).fit()


def assert_same(a: Trainer, b: Trainer) -> None:
    expected, got = whole_state(a), whole_state(b)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []
    assert read_metrics(a.out / "metrics.jsonl") == read_metrics(b.out / "metrics.jsonl")


def contents(folder) -> dict:
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def flip_a_byte(checkpoint) -> None:
    file = checkpoint / "W_enc_0.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)


def test_a_moved_run_goes_on_where_it_is_and_leaves_the_original_alone(tmp_path, model, finished):
    cut_off(tmp_path / "original", model, 5, **OFTEN)
    before = contents(tmp_path / "original")
    moved = shutil.copytree(tmp_path / "original", tmp_path / "moved")
    t = trainer(tmp_path / "original", model, **OFTEN)
    t.fit(resume=moved)
    assert contents(tmp_path / "original") == before
    assert_same(finished[1], t)
    assert t.out == moved and read_config(moved).out == str(moved)


def test_a_finished_run_takes_more_steps_and_its_schedules_follow_the_new_total(copy, model):
    before = read_metrics(copy / "metrics.jsonl")
    t = trainer(copy, model, **{**OFTEN, "steps": 8})
    t.fit(resume=copy)
    after = read_metrics(copy / "metrics.jsonl")
    assert after[:6] == before and [row["step"] for row in after] == list(range(1, 9))
    assert t.step == 8 and read_config(copy).steps == 8 and latest(copy).name == "step_00000008"


def test_fewer_steps_than_are_done_are_refused(copy, model):
    with pytest.raises(ValueError, match="steps: expected at least the 6 that .* has done, got 4"):
        trainer(copy, model, **{**OFTEN, "steps": 4}).fit(resume=copy)


def test_a_finished_run_without_more_steps_stays_as_it_is(copy, model):
    before = contents(copy)
    t = trainer(copy, model, **OFTEN)
    t.fit(resume=copy)
    after = contents(copy)
    changed = {str(name) for name in before if before[name] != after.get(name)}
    assert before.keys() == after.keys() and changed <= {"config.json"}


def test_a_run_may_end_at_an_earlier_checkpoint(copy, model):
    t = trainer(copy, model, **{**OFTEN, "steps": 4})
    clt = t.fit(resume=copy, checkpoint="step_00000004")
    kept = SparseCLT.from_pretrained(copy / "clt").state_dict()
    assert all(torch.equal(kept[name].to(tensor.dtype), tensor) for name, tensor in clt.state_dict().items())
    assert len(read_metrics(copy / "metrics.jsonl")) == 4


def test_a_changed_option_that_matters_is_refused_before_anything_is_read(copy, model):
    with pytest.raises(ValueError, match=r"resume: these options change .* seed \(0 there, now 1\)"):
        trainer(copy, model, **OFTEN, seed=1).fit(resume=copy)


def test_other_micro_batches_may_be_asked_for(copy, model):
    t = trainer(copy, model, **{**OFTEN, "steps": 7}, compute=ComputeConfig(micro_batch_rows=1))
    t.fit(resume=copy)
    assert t.objective.micro_rows == 1


def scaled(factor: float) -> LanguageModel:
    model = hf_model("gpt2", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= factor
    return LanguageModel.from_hf(model, tokenizer(), name="gpt2")


def test_other_weights_of_the_same_shape_are_refused(copy):
    with pytest.raises(ValueError, match="the weights of the language model are not those that .* was trained on"):
        trainer(copy, scaled(1.7), **OFTEN).fit(resume=copy)
    trainer(copy, scaled(1.0), **OFTEN).fit(resume=copy)


def test_weights_that_were_changed_in_place_are_noticed(copy):
    model = scaled(1.0)
    trainer(copy, model, **OFTEN).fit(resume=copy)
    with torch.no_grad():
        next(model.bridge.original_model.parameters()).mul_(1.7)
    with pytest.raises(ValueError, match="the weights of the language model"):
        trainer(copy, model, **OFTEN).fit(resume=copy)


def test_the_digest_of_the_weights_is_computed_once(model, monkeypatch):
    expected = model.digest()
    monkeypatch.setattr("sparseclt.language_model.language_model.tensors_digest", lambda tensors: 1 / 0)
    assert model.digest() == expected


def test_another_tokenizer_is_refused(copy):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "w2": 1, "w1": 2}, unk_token="<s>"))
    other = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>", unk_token="<s>")
    model = LanguageModel.from_hf(hf_model("gpt2", dtype=torch.float32), other, name="gpt2")
    with pytest.raises(ValueError, match="model.path: the tokenizer's rules are not those"):
        trainer(copy, model, **OFTEN).fit(resume=copy)


def test_a_tokenizer_stays_the_same_when_it_is_used(model):
    words = tokenizer()
    before = tokenizer_digest(words)
    words(["w1 w2", "w3"], truncation=True, max_length=1)
    assert tokenizer_digest(words) == before != tokenizer_digest(None)


def test_other_rows_are_refused(copy, model):
    with pytest.raises(ValueError, match="data.source: the rows of tokens"):
        Trainer(config(copy, **OFTEN), language_model=model, rows=ROWS.flip(0)).fit(resume=copy)


def test_a_checkpoint_brought_in_from_another_run_is_refused(copy, model, tmp_path):
    other = Trainer(config(tmp_path / "other", **OFTEN), language_model=model, rows=ROWS.flip(0))
    other.fit()
    shutil.rmtree(latest(copy))
    shutil.copytree(latest(other.out), copy / "checkpoints" / latest(other.out).name)
    with pytest.raises(ValueError, match="data.source: the rows of tokens .*step_00000006"):
        trainer(copy, model, **OFTEN).fit(resume=copy)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(tmp_path, model, finished, usual_handlers, number, status):
    handlers = signal.getsignal(number)
    t = at_step(trainer(tmp_path / "run", model, **OFTEN), 2, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted, match="after step 3 of 6, which is saved") as caught:
        t.fit()
    assert caught.value.exit_status == status and caught.value.signal == number
    assert latest(tmp_path / "run").name == "step_00000003" and signal.getsignal(number) == handlers
    t = trainer(tmp_path / "run", model, **OFTEN)
    t.fit(resume=tmp_path / "run")
    assert_same(finished[1], t)


def test_a_second_signal_ends_the_run_at_once(tmp_path, model, usual_handlers):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        at_step(trainer(tmp_path / "run", model, **OFTEN), 3, twice).fit()
    assert not isinstance(caught.value, Interrupted) and latest(tmp_path / "run").name == "step_00000002"


def test_a_run_in_a_thread_leaves_the_handlers_alone(tmp_path, model, usual_handlers):
    seen = []
    t = at_step(trainer(tmp_path / "run", model, **OFTEN), 1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    thread = threading.Thread(target=t.fit)
    thread.start()
    thread.join()
    assert t.step == 6 and seen == [signal.SIG_DFL]


def test_a_checkpoint_is_written_after_so_many_minutes(tmp_path, model, monkeypatch):
    clock = iter(range(0, 10_000, 50))  # each look at it comes 50 seconds later
    monkeypatch.setattr("sparseclt.training.trainer.time.monotonic", lambda: float(next(clock)))
    t = trainer(tmp_path, model, steps=6, checkpoints=CheckpointConfig(every_minutes=2, keep=9))
    t.fit()
    saved = sorted(int(p.name.removeprefix("step_")) for p in (tmp_path / "checkpoints").iterdir())
    assert saved == [3, 6]


@pytest.mark.parametrize("resume", [False, True], ids=["train", "resume"])
def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(tmp_path, model, finished, resume):
    cut_off(tmp_path / "run", model, 1, **OFTEN)
    t = trainer(tmp_path / "run", model, **OFTEN)
    t.fit(resume=tmp_path / "run" if resume else None)
    assert_same(finished[1], t)


def test_a_failed_first_step_leaves_no_directory_behind(tmp_path, model, monkeypatch):
    def fails():
        raise NonFiniteError("step 0: no")

    with pytest.raises(NonFiniteError):
        at_step(trainer(tmp_path / "new" / "run", model, **OFTEN), 0, fails).fit()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()  # one that was there stays
    with pytest.raises(NonFiniteError):
        at_step(trainer(tmp_path / "run", model, **OFTEN), 0, fails).fit()
    assert (tmp_path / "run").is_dir()


def test_a_missing_logger_leaves_no_directory_behind(tmp_path, model, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        trainer(tmp_path / "run", model, logging=LoggingConfig(loggers=("wandb",), progress=False)).fit()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_taken(copy, model, finished):
    flip_a_byte(latest(copy))
    t = trainer(copy, model, **OFTEN)
    with pytest.warns(UserWarning, match="W_enc_0.safetensors has changed bytes.* is now step_00000006.damaged"):
        t.fit(resume=copy)
    assert_same(finished[1], t)
    names = sorted(p.name for p in (copy / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000006", "step_00000006.damaged"]


@pytest.mark.filterwarnings("ignore:.*has changed bytes")
def test_without_a_whole_checkpoint_nothing_begins_again_in_silence(copy, model):
    before = read_metrics(copy / "metrics.jsonl")
    for path in (copy / "checkpoints").iterdir():
        flip_a_byte(path)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="expected a whole checkpoint"):
            trainer(copy, model, **OFTEN).fit(resume=copy)
    assert read_metrics(copy / "metrics.jsonl") == before


@pytest.mark.parametrize("form", ["name", "path"])
def test_a_checkpoint_can_be_chosen(copy, model, finished, form):
    chosen = copy / "checkpoints" / "step_00000004"
    t = at_step(trainer(copy, model, **OFTEN), 5, stop)
    with pytest.raises(KeyboardInterrupt):
        t.fit(resume=copy, checkpoint=chosen.name if form == "name" else chosen)
    assert [row["step"] for row in read_metrics(copy / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    names = sorted(p.name for p in (copy / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000006.superseded"]  # or the next resume would take that one
    t = trainer(copy, model, **OFTEN)
    t.fit(resume=copy)
    assert_same(finished[1], t)


def test_a_chosen_checkpoint_is_not_replaced_by_another_one(copy, model, finished):
    flip_a_byte(copy / "checkpoints" / "step_00000004")
    with pytest.raises(CheckpointError, match="W_enc_0.safetensors has changed bytes"):
        trainer(copy, model, **OFTEN).fit(resume=copy, checkpoint="step_00000004")
    with pytest.raises(ValueError, match=r"expected one of .* \(step_00000004, step_00000006\), got step_2"):
        trainer(copy, model, **OFTEN).fit(resume=copy, checkpoint="step_2")
    with pytest.raises(ValueError, match="checkpoint: expected one of"):
        trainer(copy, model, **OFTEN).fit(resume=copy, checkpoint=latest(finished[0]))
