"""What commands print: with --json one object on one line, the last of standard output."""

from __future__ import annotations

import json
import math
from typing import Any


def print_json(values: dict[str, Any]) -> None:
    """One line of JSON. Infinity, which JSON does not know, becomes null."""
    plain = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }
    print(json.dumps(plain, allow_nan=False), flush=True)
