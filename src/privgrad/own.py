"""What is of the user's own, and named in a configuration: "package.module:Name"."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from privgrad.errors import PrivgradError, reason_of


def imported(key: str, name: str) -> Any:
    """What a name stands for. key: where it was given, for the error. This runs the module's code.

    Raises:
        PrivgradError: whatever the import raises, in one line.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a module of the user's own may raise anything
        raise PrivgradError(
            f"{key} is {name!r}, which cannot be imported: {type(error).__name__}: {reason_of(error)}"
        ) from error


def check_trusted(key: str, name: str) -> None:
    """Nobody's code is run unasked, where a run may be another's; what this process has imported already runs anyway.

    Raises:
        PrivgradError: "package.module:Name" of a module that is not imported yet.
    """
    module, colon, _ = name.partition(":")
    if colon and module not in sys.modules:
        raise PrivgradError(
            f"{key} is {name!r}, of the user's own, whose code is not run unasked; where you trust it, say so: --own"
        )
