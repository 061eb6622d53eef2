"""SIGINT and SIGTERM end a run after the step that is under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at SIGINT or SIGTERM within the block; a SIGINT after either raises KeyboardInterrupt.

    Only the main thread receives signals; in another one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopped = True
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
