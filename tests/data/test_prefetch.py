"""Work one item ahead: its order, and on CUDA the streams and events that keep it apart from the caller's."""

import threading

import pytest
import torch

from sparseclt.data.prefetch import one_ahead


class Streams:
    """Stands for torch.cuda: who waits for what and who does what, in the order of each stream."""

    def __init__(self):
        self.queues: dict[str, list[str]] = {"main": [], "side": []}
        self.current = threading.local()

    def work(self, what: str) -> None:
        self.queues[getattr(self.current, "name", "main")].append(what)

    def Stream(self, device):
        assert device == torch.device("cuda", 1)
        return FakeStream(self, "side")

    def current_stream(self, device):
        return FakeStream(self, getattr(self.current, "name", "main"))

    def stream(self, stream):
        return Entered(self, stream.name)

    def Event(self):
        return FakeEvent()


class Entered:
    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name

    def __enter__(self):
        self.streams.current.name = self.name

    def __exit__(self, *_):
        self.streams.current.name = "main"


class FakeEvent:
    behind = ""

    def record(self, stream) -> None:
        self.behind = stream.last()


class FakeStream:
    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name

    def last(self) -> str:
        done = [what for what in self.streams.queues[self.name] if not what.startswith("wait")]
        return done[-1] if done else "nothing"

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.record(self)
        return event

    def wait_event(self, event: FakeEvent) -> None:
        self.streams.queues[self.name].append(f"wait for {event.behind}")


@pytest.fixture
def streams(monkeypatch) -> Streams:
    streams = Streams()
    for name in ("Stream", "stream", "current_stream", "Event"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    return streams


def test_items_come_in_order_and_each_is_begun_before_the_last_is_done_with():
    begun = [threading.Event() for _ in range(4)]

    def items():
        for i in range(4):
            begun[i].set()
            yield i

    for i, item in enumerate(one_ahead(items())):
        assert i == item and all(event.wait(60) for event in begun[: i + 2])


def test_an_error_is_raised_when_its_item_is_asked_for():
    def items():
        yield 1
        raise ZeroDivisionError

    ahead = one_ahead(items())
    assert next(ahead) == 1
    with pytest.raises(ZeroDivisionError):
        next(ahead)


def test_no_stream_is_made_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", None)
    for device in (None, torch.device("cpu")):
        assert list(one_ahead(range(3), device)) == [0, 1, 2]


def test_on_cuda_items_are_made_on_a_stream_of_their_own_and_both_streams_wait(streams):
    def items():
        for i in range(3):
            streams.work(f"make {i}")
            yield i

    for i in one_ahead(items(), torch.device("cuda", 1)):
        streams.work(f"use {i}")
    used = [[f"wait for make {i}", f"use {i}"] for i in range(3)]
    assert streams.queues["main"] == sum(used, [])
    # An item may take the memory of the last but one: not before that was used.
    assert streams.queues["side"] == [
        "wait for nothing", "make 0", "wait for nothing", "make 1", "wait for use 0", "make 2", "wait for use 1"
    ]  # fmt: skip


def test_an_items_memory_is_kept_until_the_caller_has_asked_for_the_next_one(streams):
    """Freed earlier, it could be overwritten by what is just being made, before the caller's kernels have run."""
    alive: list[str] = []

    class Item:
        def __init__(self, name: str):
            self.name = name
            alive.append(name)

        def __del__(self):
            alive.remove(self.name)

    ahead = one_ahead((Item(str(i)) for i in range(3)), torch.device("cuda", 1))
    name = next(ahead).name  # the caller keeps nothing
    assert name in alive
