"""Where files meet the libraries that read them: whatever they find wrong becomes one line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from privgrad.errors import PrivgradError

_LONGEST_REASON = 200


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any failure of a library inside into "WHAT cannot be read: reason".

    (On damaged input, readers raise nearly every built-in exception: SyntaxError, KeyError, struct.error, ...)
    """
    try:
        yield
    except PrivgradError:
        raise
    except MemoryError as error:
        raise PrivgradError(f"{what} cannot be read: it asks for more memory than there is") from error
    except OSError as error:
        raise PrivgradError(f"{what} cannot be read: {reason(error.strerror or error)}") from error
    except Exception as error:
        raise PrivgradError(f"{what} cannot be read: {reason(error)}") from error


def reason(error: object) -> str:
    """What a library says, in one short line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST_REASON else text[:_LONGEST_REASON] + "..."


def quoted(value: object) -> str:
    """A value of the data in an error text, cut short."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def check_memory(what: str, needed: int) -> None:
    """Refuse what cannot fit in this machine's memory, before it is asked for."""
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # pragma: no cover - a platform that does not say
        return
    if needed > there:
        raise PrivgradError(
            f"{what} needs {needed / 2**30:,.1f} GiB of memory, and this machine has {there / 2**30:,.1f}; "
            "give fewer records or smaller images (data.images.size)"
        )
