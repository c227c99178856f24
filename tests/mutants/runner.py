"""One mutant: applied to a copy of the tree, and its tests run on the copy in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.mutants.catalogue import Mutant

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300
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


def suite(tests: tuple[str, ...], source: Path, output: Path) -> None:
    """In a process of its own: pytest on `source`, what it prints in `output`, its answer as the exit code."""
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.path[:0] = [str(source), str(ROOT)]
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # for processes that tests start
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])
    if not Path(sys.modules["privgrad"].__file__ or "").is_relative_to(source):
        raise SystemExit("another copy of privgrad was tested")
    sys.exit({pytest.ExitCode.OK: GREEN, pytest.ExitCode.TESTS_FAILED: RED}.get(code, 1))


def run(tests: tuple[str, ...], source: Path, timeout: int = TIMEOUT) -> bool:
    """True where the tests fail, or do not end. Processes are forked from one that has imported the libraries."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = PROCESSES.Process(target=suite, args=(tests, source, output))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            return True
        if process.exitcode not in (GREEN, RED):
            # Not red but broken: nothing was collected, another copy was tested, or pytest itself fell over.
            raise SystemExit(f"no answer (exit code {process.exitcode}) of {tests}:\n{output.read_text()[-2000:]}")
    return process.exitcode == RED


def killed(mutant: Mutant) -> tuple[bool, float]:
    """Whether the suite finds one mutant, and after how many seconds."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        # With what Python has compiled: most files are imported as they were.
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("*.egg-info", "*.pyc.*"))
        apply(mutant, source)
        return run(mutant.tests, source), time.monotonic() - started
