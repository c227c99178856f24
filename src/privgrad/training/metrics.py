"""metrics.jsonl: one line for each look at the declared split, of the weights that the run went on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from privgrad.errors import PrivgradError
from privgrad.files import append_line, canonical_json, reason, write_atomically


class Metrics:
    """The lines of metrics.jsonl, in the order of their steps, each step at most once.

    last: the step of the last line, 0 where there is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.last = 0

    def add(self, entry: dict[str, Any]) -> None:
        """Write one line. entry: what was measured, with its 'step'."""
        append_line(self._path, canonical_json(entry))
        self.last = entry["step"]

    def go_back(self, step: int) -> None:
        """Keep the lines up to `step`: the weights of later ones were lost, and a torn line was never written."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        except OSError as error:
            raise PrivgradError(f"{self._path} cannot be read: {reason(error)}") from error
        kept: list[bytes] = []
        self.last = 0
        for line in lines:
            found = _step_of(line)
            if not self.last < found <= step:
                break
            kept.append(line)
            self.last = found
        if kept != lines:
            write_atomically(self._path, b"".join(kept))


def _step_of(line: bytes) -> int:
    """The step of a whole line; 0 of any other."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return 0
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if line.endswith(b"\n") and type(step) is int else 0
