"""SIGINT and SIGTERM while a run trains: the step is finished and saved before the run stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal stopped a run after it had written a checkpoint. `exit_status`: 128 and the signal's number."""

    def __init__(self, message: str, number: signal.Signals):
        super().__init__(message)
        self.signal, self.exit_status = number, 128 + number


class StopRequest:
    """Whether a signal asked the run to stop, and which."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first SIGINT or SIGTERM is taken down as a request; a second one has its usual effect, at once.

    Elsewhere than in the main thread, where Python allows no handlers, nothing is taken down. A signal that the process
    ignores, as under `nohup`, stays ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    usual: dict[signal.Signals, Any] = {
        number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN
    }

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def take_down(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()

    for number in usual:
        signal.signal(number, take_down)
    try:
        yield request
    finally:
        restore()
