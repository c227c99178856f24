"""A sample of the fuzzed cases; the full count by `python -m tests.fuzz`."""

from __future__ import annotations

from tests.fuzz.__main__ import fuzz


def test_nonsense_gets_an_exit_code_and_a_line() -> None:
    found = fuzz(range(90))
    assert found.failures == []
    assert sum(found.codes.values()) == 90
