"""Shuffled batches: what is in them, that they follow from the step alone, and what is held for them."""

from threading import Event

import pytest
import torch
from clts import language_model
from test_trainer import trainer, whole_state
from tiny_models import LAYERS, WIDTH

from sparseclt.config import ActivationConfig
from sparseclt.data import activation_stream
from sparseclt.data.activation_stream import block_batches, buffer_bytes, shuffled, token_bytes
from sparseclt.data.row_stream import RowStream
from sparseclt.model.activations import Activations
from sparseclt.training.loggers import read_metrics

B, S, R = 2, 3, 20
PATIENCE = 60  # seconds after which a test gives up on another thread


def read(chosen: torch.Tensor) -> Activations:
    """Activations that tell which token they belong to, and which they are."""
    token = chosen[:, None] * S + torch.arange(S)

    def tensor(i: int) -> torch.Tensor:
        return (token + 1000.0 * i)[..., None].expand(-1, -1, 2)

    return Activations(
        token, tensor(0), [tensor(1), tensor(2)], [token + 0.25, token + 0.5], [tensor(3), tensor(4)],
        [tensor(5), tensor(6)],
    )  # fmt: skip


def stream() -> RowStream:
    return RowStream(torch.zeros(R, S, dtype=torch.int32), B, seed=4)


def batches(steps: range, size: int, read=read):
    return shuffled(read, stream(), steps, size)


def all_of(batch: Activations) -> torch.Tensor:
    return torch.cat([t.flatten() for t in (batch.tokens, *activation_stream.vectors_of(batch), *batch.scale)])


def test_a_block_gives_out_each_of_its_tokens_once_and_all_that_belongs_to_it():
    expected = stream()
    given = list(batches(range(14), 4))
    assert len(given) == 14
    for block in range(4):
        tokens = torch.cat([batch.tokens for batch in given[4 * block : 4 * block + 4]]).flatten()
        rows = torch.cat([expected.take() for _ in range(4 if block < 3 else 2)])
        assert tokens.sort().values.equal(read(rows).tokens.flatten().sort().values)
    for batch in given:
        whole = read(torch.zeros(B, dtype=torch.int64))
        assert all(a.shape == b.shape for a, b in zip(batch.x, whole.x, strict=True))
        for i, vectors in enumerate(activation_stream.vectors_of(batch)):
            assert vectors.equal((batch.tokens + 1000.0 * i)[..., None].expand(-1, -1, 2))
        assert batch.scale[0].equal(batch.tokens + 0.25) and batch.scale[1].equal(batch.tokens + 0.5)


def test_tokens_leave_their_rows_and_each_block_has_an_order_of_its_own():
    given = list(batches(range(20), 10))
    neighbours = torch.stack([batch.tokens for batch in given])[:, :, :2]
    assert (neighbours[..., 1] - neighbours[..., 0] == 1).float().mean() < 0.3
    rows = RowStream(torch.zeros(B * 10, S, dtype=torch.int32), B, seed=4)
    rows.take = lambda: torch.arange(B)  # the same rows again and again
    first, second = (torch.cat([b.tokens for b in part]) for part in _halves(shuffled(read, rows, range(20), 10)))
    assert not first.equal(second)


def _halves(given) -> tuple[list, list]:
    given = list(given)
    return given[: len(given) // 2], given[len(given) // 2 :]


@pytest.mark.parametrize("start", range(12))
def test_a_stream_begun_at_any_step_gives_the_same_batches(start):
    whole, rest = list(batches(range(11), 3)), list(batches(range(start, 11), 3))
    assert len(rest) == max(0, 11 - start)
    assert all(all_of(a).equal(all_of(b)) for a, b in zip(whole[start:], rest, strict=True))


def test_the_next_block_is_read_while_this_one_is_in_use_and_leaves_it_as_it_is():
    expected, ready, count = list(batches(range(12), 4)), Event(), []

    def counting(chosen):
        count.append(1)
        activations = read(chosen)
        if len(count) == 8:
            ready.set()
        return activations

    given = batches(range(12), 4, counting)
    first = next(given)
    assert ready.wait(PATIENCE), "the second block was not read before the first was used up"
    for got, want in zip([first, *given], expected, strict=True):
        assert all_of(got).equal(all_of(want))


def test_a_stream_that_is_closed_does_not_read_its_block_to_the_end():
    size, count, begun, closing = 60, [], Event(), Event()

    def counting(chosen):
        count.append(1)
        if len(count) > size:
            begun.set()
            assert closing.wait(PATIENCE)
        return read(chosen)

    given = batches(range(3 * size), size, counting)
    next(given)
    assert begun.wait(PATIENCE)
    closing.set()
    given.close()
    assert len(count) < 2 * size


def test_an_error_while_reading_reaches_the_one_who_asks():
    def failing(chosen):
        raise OSError("no such shard")

    with pytest.raises(OSError, match="no such shard"):
        next(batches(range(4), 2, failing))


@pytest.mark.parametrize("size", [7, 8, 9, 20])
@pytest.mark.parametrize("steps", [3, 60])
def test_what_is_allocated_is_within_the_bytes_allowed_and_what_was_planned(monkeypatch, size, steps):
    batch = B * S * token_bytes(2, 2)
    allowed, sizes = size * batch + batch // 2, []
    original = activation_stream.Block.__init__
    monkeypatch.setattr(
        activation_stream.Block, "__init__", lambda self, T, like: (sizes.append(T), original(self, T, like))[1]
    )
    count = block_batches(allowed, B * S, 2, 2)
    for _ in batches(range(steps), count):
        pass
    held = sum(sizes) * token_bytes(2, 2) + activation_stream.BESIDE_BLOCKS * batch
    assert held == buffer_bytes(allowed, B * S, steps, 2, 2) <= allowed
    assert steps == 3 or allowed - held < 3 * batch


def test_a_buffer_that_is_too_small_says_what_it_takes():
    least = 7 * B * S * token_bytes(2, 2)
    assert block_batches(least, B * S, 2, 2) == 2
    with pytest.raises(ValueError, match=f"activations.shuffle_bytes: expected at least {least} .* got {least - 1}"):
        block_batches(least - 1, B * S, 2, 2)


@pytest.fixture(scope="module")
def model():
    return language_model("gpt2", torch.float32)


BLOCKS_OF_3 = ActivationConfig(shuffle_bytes=9 * 24 * token_bytes(LAYERS, WIDTH))


def cut_off(out, model, at: int, **changes) -> None:
    """A run that ends, like one that is interrupted, before step `at`."""
    t = trainer(out, model, **changes)
    original = t.train_step

    def stops(activations):
        if t.step == at:
            raise KeyboardInterrupt
        return original(activations)

    t.train_step = stops
    with pytest.raises(KeyboardInterrupt):
        t.fit()


def test_a_run_cut_off_within_a_block_goes_on_to_the_bit(tmp_path, model):
    changes = {"activations": BLOCKS_OF_3}
    whole = trainer(tmp_path / "whole", model, **changes)
    whole.fit()
    cut_off(tmp_path / "cut", model, 5, **changes)
    resumed = trainer(tmp_path / "cut", model, **changes)
    resumed.fit(resume=tmp_path / "cut")  # from step 4: the second of its block's three
    expected, got = whole_state(whole), whole_state(resumed)
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "cut" / "metrics.jsonl")
    plain = trainer(tmp_path / "plain", model)
    plain.fit()
    assert not torch.equal(plain.clt.transcoder(0).W_enc, whole.clt.transcoder(0).W_enc)


def test_without_shuffling_a_batch_is_the_captured_rows_to_the_bit(tmp_path, model):
    t = trainer(tmp_path, model)
    rows = RowStream(t.batches.rows, 2, t.config.seed)
    captured = [model.capture(next(rows)) for _ in range(t.config.steps)]  # now: no two threads may run the model
    for batch, expected in zip(t.batches.from_step(t.step), captured, strict=True):
        assert batch.tokens.equal(expected.tokens) and all_of(batch).equal(all_of(expected))


@pytest.mark.parametrize("activations", [ActivationConfig(), BLOCKS_OF_3], ids=["rows", "shuffled"])
def test_the_trainer_finds_its_next_batch_ready(tmp_path, model, monkeypatch, activations):
    """Each step but the last waits here until its successor's batch is made, which without prefetch it never is."""
    t = trainer(tmp_path, model, activations=activations)
    made = [Event() for _ in range(t.config.steps)]
    if activations.shuffle_bytes:
        take, count = activation_stream.Block.take, iter(made)
        monkeypatch.setattr(
            activation_stream.Block, "take", lambda self, chosen: (take(self, chosen), next(count).set())[0]
        )
    else:
        capture, count = t.batches.capture, iter(made)
        monkeypatch.setattr(t.batches, "capture", lambda tokens: (capture(tokens), next(count).set())[0])
    original = t.train_step

    def waits(batch):
        metrics = original(batch)
        assert t.step == t.config.steps or made[t.step].wait(PATIENCE), f"batch {t.step} was not made ahead"
        return metrics

    t.train_step = waits
    t.fit()
    assert all(event.is_set() for event in made)


def test_a_buffer_too_small_for_the_model_is_refused_when_the_trainer_is_made(tmp_path, model):
    least = 7 * 24 * token_bytes(LAYERS, WIDTH)
    with pytest.raises(ValueError, match=f"activations.shuffle_bytes: expected at least {least}"):
        trainer(tmp_path, model, activations=ActivationConfig(shuffle_bytes=least - 1))
