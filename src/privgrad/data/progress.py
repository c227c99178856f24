"""What a person sees while many images are decoded: a bar on a terminal, plain lines elsewhere, nothing within a second."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_QUIET_SECONDS = 1.0
_SECONDS_BETWEEN_LINES = 2.0


class Progress:
    """Used as `with Progress(title, total) as progress: ... progress.update(done)`; on standard error."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._next = time.monotonic() + _QUIET_SECONDS
        return self

    def update(self, done: int) -> None:
        """So many are done now."""
        now = time.monotonic()
        if now < self._next:
            return
        if not sys.stderr.isatty():
            print(f"{self._title}: {done}/{self._total}", file=sys.stderr, flush=True)
            self._next = now + _SECONDS_BETWEEN_LINES
            return
        if self._bar is None:
            self._bar = Bar(
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=done)
        self._next = now + 0.1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
