"""What is of the user's own, and named in a configuration: "package.module:Name"."""

from __future__ import annotations

import importlib
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
