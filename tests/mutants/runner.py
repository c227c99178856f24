"""One mutant: applied to a copy of the tree, and its tests run on the copy in a process of its own.

The test that killed a mutant last time (killers.json, written by `--remember`) is run first, and the others only where it is
green or gone: what is remembered makes the answer faster and never another.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mutants.catalogue import Mutant

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
KILLERS = Path(__file__).with_name("killers.json")
GREEN, RED = 40, 41  # no process that falls over ends with these
# Most of a mutant's time would be the import of libraries: a server imports them once, and forks.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        "torch",
        "dp_accounting",
        "scipy.stats",
        "hypothesis",
        "pytest",
        "pyarrow.parquet",
        "safetensors.torch",
        "typer",
        "rich",
    ]
)


def apply(mutant: Mutant, source: Path) -> None:
    """Edit the copy. The text to replace must occur exactly once: a mutant that no longer applies is an error, not a kill."""
    path = source / "privgrad" / mutant.file
    text = path.read_text()
    if text.count(mutant.before) != 1:
        raise SystemExit(
            f"mutant {mutant.name!r} no longer applies: {mutant.file} holds its text {text.count(mutant.before)} times"
        )
    path.write_text(text.replace(mutant.before, mutant.after))
    for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
        compiled.unlink()  # of the text before: Python would tell them apart by the second of the edit and the size alone


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant. killer: the test that failed; None where none did, or where the tests did not end."""

    killed: bool
    killer: str | None
    seconds: float


def remembered() -> dict[str, str]:
    """The test that killed each mutant last time; nothing of mutants that are new."""
    return dict(json.loads(KILLERS.read_text())) if KILLERS.exists() else {}


class _FirstFailure:
    """A plugin of pytest: the name of the first test that fails goes to a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.file.exists():
            self.file.write_text(report.nodeid)


def suite(tests: tuple[str, ...], source: Path, folder: Path) -> None:
    """In a process of its own: pytest on `source`, what it says in files of `folder`, its answer as the exit code."""
    with (folder / "output").open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.path[:0] = [str(source), str(ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for processes that tests start
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    code = pytest.main([*options, *tests], plugins=[_FirstFailure(folder / "killer")])
    if not Path(sys.modules["privgrad"].__file__ or "").is_relative_to(source):
        raise SystemExit("another copy of privgrad was tested")
    sys.exit({pytest.ExitCode.OK: GREEN, pytest.ExitCode.TESTS_FAILED: RED}.get(code, 1))


def run(tests: tuple[str, ...], source: Path, timeout: int = TIMEOUT) -> tuple[bool, str | None]:
    """Whether the tests fail or do not end, and which failed. Processes are forked from one that has imported the libraries.

    Raises:
        SystemExit: not red but broken: nothing was collected, another copy was tested, or pytest itself fell over.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = PROCESSES.Process(target=suite, args=(tests, source, folder))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return True, None
        if process.exitcode not in (GREEN, RED):
            output = (folder / "output").read_text()
            raise SystemExit(f"no answer (exit code {process.exitcode}) of {tests}:\n{output[-2000:]}")
        killer = folder / "killer"
        return process.exitcode == RED, killer.read_text() if killer.exists() else None


def judge(mutant: Mutant, first: str | None) -> Verdict:
    """Whether the suite finds one mutant. first: the test that is likely to, if one is known."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        # With what Python has compiled: most files are imported as they were.
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("*.egg-info", "*.pyc.*"))
        apply(mutant, source)
        dead, killer = False, None
        if first is not None:
            with contextlib.suppress(SystemExit):  # a test that was renamed: pytest finds nothing to run
                dead, killer = run((first,), source)
        if not dead:
            dead, killer = run(mutant.tests, source)
        return Verdict(dead, killer, time.monotonic() - started)
