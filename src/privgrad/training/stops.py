"""Ctrl-C: the first one asks a run to end after its step, the second one ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from privgrad.errors import PrivgradError


class InterruptedRunError(PrivgradError):
    """The user stopped the run. Everything is on the disk."""


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C (or a polite kill) sets; the second one is an ordinary KeyboardInterrupt."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def handle(number: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
