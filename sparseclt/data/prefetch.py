"""Work done one item ahead in a thread, so that the next batch is there when the step ends."""

from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def one_ahead(items: Iterable[T], device: torch.device | None = None) -> Generator[T, None, None]:
    """The same items in the same order, each made by a background thread while its predecessor is in use.

    On a CUDA `device` they are made on a stream of their own, beside the kernels of the caller's stream. Work on an
    item begins on the device when the caller's work on the last one but one is done, whose memory it may take: an item
    must not be used after the next one was asked for.

    What making an item raises is raised when that item is asked for.
    """
    source, end, side = iter(items), object(), _SideStream(device)

    def following(begin: Any) -> tuple[Any, Any]:
        with side.after(begin) as made:
            return next(source, end), made

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        future = thread.submit(following, side.mark_caller())
        while True:
            item, made = future.result()
            if item is end:
                return
            future = thread.submit(following, side.mark_caller())
            side.let_caller_wait(made)
            yield item


class _SideStream:
    """A CUDA stream beside the caller's, and the events by which each waits for the other; nothing on other devices."""

    def __init__(self, device: torch.device | None):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None

    @contextmanager
    def after(self, begin: Any) -> Iterator[Any]:
        """Runs its block on the side stream, behind event `begin`; gives the event of the block's end."""
        if self.stream is None:
            yield None
            return
        made = torch.cuda.Event()
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(begin)
            yield made
            made.record(self.stream)

    def mark_caller(self) -> Any:
        """An event behind all that the caller has asked of the device so far."""
        return None if self.stream is None else torch.cuda.current_stream(self.device).record_event()

    def let_caller_wait(self, made: Any) -> None:
        """What the caller asks of the device from now on waits for event `made`."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_event(made)
