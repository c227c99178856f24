"""What a person sees of a long run: a live bar on a terminal, plain lines elsewhere. Always on standard error."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 2.0


class ProgressDisplay(Protocol):
    """Follows a run from its first step to its last."""

    def start(self, done: int, total: int) -> None: ...

    def step(self, done: int, notes: str) -> None: ...

    def stop(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, done: int, total: int) -> None:
        pass

    def step(self, done: int, notes: str) -> None:
        pass

    def stop(self) -> None:
        pass


class LiveBar:
    """A bar with steps, notes (epsilon spent, accuracy) and the time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[notes]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
        )

    def start(self, done: int, total: int) -> None:
        self._task = self._progress.add_task("train", total=total, completed=done, notes="")
        self._progress.start()

    def step(self, done: int, notes: str) -> None:
        self._progress.update(self._task, completed=done, notes=notes)

    def stop(self) -> None:
        self._progress.stop()


class PlainLines:
    """A line when the notes change, and otherwise every two seconds."""

    def start(self, done: int, total: int) -> None:
        self._total, self._printed, self._notes = total, -_SECONDS_BETWEEN_LINES, ""
        self._first: int | None = None

    def step(self, done: int, notes: str) -> None:
        now = time.monotonic()
        if self._first is None:  # the clock starts behind the first step, which warms up caches and workers
            self._first, self._begun = done, now
        if notes == self._notes and now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed, self._notes = now, notes
        timed = done - self._first
        left = f"{(now - self._begun) / timed * (self._total - done):.0f} s left" if timed else ""
        with suppress(OSError):  # nobody reads it any more; the training goes on
            print("  ".join(filter(None, (f"step {done}/{self._total}", notes, left))), file=sys.stderr, flush=True)

    def stop(self) -> None:
        pass


def display(*, quiet: bool = False) -> ProgressDisplay:
    """The display that fits where standard error goes."""
    if quiet:
        return Silent()
    return LiveBar() if sys.stderr.isatty() else PlainLines()
