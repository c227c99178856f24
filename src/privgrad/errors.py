"""Errors for people: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Iterable
from enum import Enum
from typing import TypeVar

Member = TypeVar("Member", bound=Enum)


class PrivgradError(Exception):
    """A problem that the reader can mend. The command line prints it as one line and exits with 2."""


class RefusedError(PrivgradError):
    """A combination for which there is no proof of privacy. It is refused with the reason, never approximated."""


class VerificationError(PrivgradError):
    """A ledger, plan, certificate or model file that does not match the others. `privgrad verify` exits with 1."""


def command() -> str:
    """What the user types to reach the command line: `privgrad`, or the script of a checkout, which says its name."""
    return os.environ.get("PRIVGRAD_COMMAND", "privgrad")


def nearest(word: str, known: Iterable[str]) -> str:
    """The words of a hint: the nearest known name, or all of them where none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + ", ".join(names) if names else "there is none in this version"


def choice(name: str, choices: type[Member], value: object) -> Member:
    """The member of an enumeration that a value names."""
    try:
        return choices(value)
    except ValueError:
        raise PrivgradError(f"{name} is {value!r}; {nearest(str(value), [c.value for c in choices])}") from None


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Refuse anything that is not a finite number inside the given interval."""
    wanted = []
    if above is not None:
        wanted.append(f"above {above:g}")
    if at_least is not None:
        wanted.append(f"at least {at_least:g}")
    if below is not None:
        wanted.append(f"below {below:g}")
    if at_most is not None:
        wanted.append(f"at most {at_most:g}")
    expected = "a finite number " + " and ".join(wanted)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
        raise PrivgradError(f"{name} is {value!r}; expected {expected.strip()}")
    inside = (
        (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not inside:
        raise PrivgradError(f"{name} is {value!r}; expected {expected}")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def reason_of(error: BaseException) -> str:
    """The first line of what a library says; the kind of error where it says nothing."""
    words = str(error).strip()
    return words.splitlines()[0] if words else type(error).__name__


def check_count(name: str, value: object, *, at_least: int = 1, at_most: int | None = None) -> None:
    """Refuse anything that is not a whole number of at least `at_least` and at most `at_most`."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < at_least or (at_most is not None and value > at_most):  # type: ignore[operator]
        until = "" if at_most is None else f" and at most {at_most:,}"
        raise PrivgradError(f"{name} is {_short(value)}; expected a whole number of at least {at_least}{until}")


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return text if len(text) <= 100 else text[:97] + "..."
