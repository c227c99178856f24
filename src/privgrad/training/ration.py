"""How often what takes time may be repeated."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Ration:
    """Work beside training that may take a share of its time.

    Due at first, and again once the last turn took no more than that share of the time since.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._ended = time.monotonic()
        self._took = 0.0

    @property
    def due(self) -> bool:
        """Whether another turn like the last would stay within the share."""
        return (time.monotonic() - self._ended) * self._share >= self._took

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Take the time of one turn."""
        begun = time.monotonic()
        yield
        self._ended = time.monotonic()
        self._took = self._ended - begun
