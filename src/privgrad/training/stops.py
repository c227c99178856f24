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
    """An event that the first Ctrl-C (or a polite kill, or a closed terminal) sets; the second is a KeyboardInterrupt."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return

    def handle(number: int, frame: Any) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    # A terminal that is closed, too, unless nohup asked to outlive it.
    stops = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        stops.append(signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in stops}
    try:
        yield requested
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
