"""Requests to end, noted instead of obeyed at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def listening(note: Callable[[int], None]) -> Iterator[None]:
    """Within the block SIGTERM and SIGINT do nothing but call this, with their number. Only the main thread can listen: in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heard(number: int, frame: FrameType | None) -> None:
        note(number)

    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
