"""What `privgrad` on the command line starts: as `privgrad.cli`, with a Ctrl-C that is as quiet while the libraries load.

It stands outside the package, because a module inside cannot run before the package has loaded them (seconds).
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGINT, _stop)
    # torch then asks for huge pages, where Linux has them: a large batch is gathered in a fifth of the time. It reads this once.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from privgrad.cli import main as run

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


def _stop(number: int, frame: FrameType | None) -> None:
    # At once: an exception inside a library that is half loaded ends in a page of its insides.
    os.write(2, b"privgrad: stopped before anything was begun\n")
    os._exit(130)
