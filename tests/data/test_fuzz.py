"""Damaged files of every kind: refused in one line or rightly read; no traceback, no crash, no hang.

PRIVGRAD_FUZZ=2400 python -m pytest tests/data/test_fuzz.py runs more cases than the default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data import fuzz

CASES = int(os.environ.get("PRIVGRAD_FUZZ", "300"))
SECONDS_PER_CASE = 1.0
ROOT = Path(__file__).resolve().parents[2]


def outcomes(first: int, count: int) -> list[dict[str, Any]]:
    """Run cases in a process of their own: a library that crashes or hangs takes only that with it."""
    command = [sys.executable, "-m", "tests.data.fuzz", str(first), str(count)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            out, err = child.communicate(timeout=60 + SECONDS_PER_CASE * count)
        except subprocess.TimeoutExpired:
            child.kill()
            out, err = child.communicate()
            pytest.fail(f"a case hangs: {out.splitlines()[-1]}")
    lines = [json.loads(line) for line in out.splitlines()]
    assert child.returncode == 0, f"crashed with {child.returncode} in {lines[-1:]}: {err[-500:]}"
    assert err == "", "a library wrote to standard error"
    return [line for line in lines if "said" in line]


def test_damaged_files_are_refused_or_rightly_read() -> None:
    found = outcomes(0, CASES)
    assert len(found) == CASES
    failed = [
        f"case {line['case']} ({line['kind']}): {line['said'][-1500:]}"
        for line in found
        if line["said"].startswith("FAILED")
    ]
    assert not failed, "\n".join(failed[:5])
    tally = Counter((line["kind"], line["said"].split(":")[0]) for line in found)
    for maker in fuzz.MAKERS:
        assert tally[maker.__name__, "refused"] > 5, "the damage does not reach the reader"
    assert tally["csv_case", "accepted"] > 5, "the oracle has nothing to compare"


def test_the_harness_sees_what_it_looks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers that look over damage must be caught: without its checksums PNG is such a reader."""
    monkeypatch.setattr("privgrad.data.images._check_png", lambda data: None)
    caught = 0
    for number in range(5, 600, len(fuzz.MAKERS)):  # folders of PNG files
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            fuzz.verdict(fuzz.make(number, folder))
        except AssertionError:
            caught += 1
    assert caught > 0
