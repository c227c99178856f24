"""What commands print: with --json one object on one line, the last of standard output."""

from __future__ import annotations

import json
import math
from typing import Any


def print_json(values: dict[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(plain(values), allow_nan=False), flush=True)


def plain(value: Any) -> Any:
    """The value as JSON knows it: infinity, at any depth, becomes null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
