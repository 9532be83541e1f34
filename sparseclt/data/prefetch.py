"""Work done one item ahead in a thread, so that the next batch is there when the step ends."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The same items in the same order, each made by a background thread while its predecessor is in use.

    What making an item raises is raised when that item is asked for.
    """
    source, end = iter(items), object()
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        future = thread.submit(next, source, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, source, end)
            yield item  # type: ignore[misc]
