"""Inject faults into the file operations of whole runs: `python -m tests.faults [--points 1000] [--json FILE]`.

Each point is one operation of one run, and one thing that goes wrong there: an error, or the death of the process, with or
without the power. `tests.faults.lives.check` says what must hold afterwards.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults.disk import ERRORS, KILLS, Fault, Point
from tests.faults.lives import SHAPES, Shape, check, trace_of


@dataclass(frozen=True)
class Case:
    """One fault at one operation of one run."""

    shape: Shape
    point: Point
    kind: str

    @property
    def words(self) -> str:
        return (
            f"{self.shape.name}: {self.kind} at operation {self.point.number}, {self.point.operation} {self.point.name}"
        )


def all_cases(root: Path) -> list[Case]:
    """Every operation of every shape, with everything that can go wrong there."""
    cases = []
    for number, shape in enumerate(SHAPES):
        folder = root / f"trace-{number}"
        folder.mkdir()
        for point in trace_of(shape, folder):
            cases += [Case(shape, point, kind) for kind in (*KILLS, *ERRORS[point.operation])]
    return cases


def sample(cases: list[Case], count: int) -> list[Case]:
    """`count` cases, as many as possible of different (operation, file, kind of fault), then of different shapes."""
    chance = random.Random(0)
    groups: dict[Any, list[Case]] = defaultdict(list)
    for case in chance.sample(cases, len(cases)):
        groups[case.point.operation, case.point.name, case.kind].append(case)
    ranked = [(rank, chance.random(), case) for group in groups.values() for rank, case in enumerate(group)]
    return [case for _, _, case in sorted(ranked, key=lambda entry: entry[:2])][:count]


def run_all(cases: list[Case], root: Path) -> tuple[Counter[str], list[str]]:
    """How the lives with the faults ended, and the cases in which something did not hold."""
    ends: Counter[str] = Counter()
    failures: list[str] = []
    for number, case in enumerate(cases):
        folder = root / f"case-{number}"
        folder.mkdir()
        try:
            ended = check(case.shape, Fault(case.point.number, case.kind), folder, seed=number)
            ends[ended if ended in ("finished", "killed") else "refused in words"] += 1
        except Exception as error:  # whatever it is, it is the finding
            failures.append(f"{case.words}: {type(error).__name__}: {error}")
            print(failures[-1], file=sys.stderr, flush=True)
        if sys.stderr.isatty() and number % 50 == 0:
            print(f"\r{number}/{len(cases)}", end="", file=sys.stderr, flush=True)
    return ends, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=1000, help="how many; 0 for all that there are")
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    begun = time.monotonic()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        known = all_cases(Path(name))
        cases = sample(known, arguments.points or len(known))
        ends, failures = run_all(cases, Path(name))
    result = {
        "command": f"python -m tests.faults --points {arguments.points}",
        "points": len(cases),
        "of": len(known),
        "failures": failures,
        "life_with_the_fault": dict(sorted(ends.items())),
        "by_fault": dict(sorted(Counter(case.kind for case in cases).items())),
        "by_operation": dict(sorted(Counter(case.point.operation for case in cases).items())),
        "by_file": dict(
            sorted(Counter(case.point.name.removeprefix(".").removesuffix(".tmp") for case in cases).items())
        ),
        "by_run": dict(Counter(case.shape.name for case in cases)),
        "seconds": round(time.monotonic() - begun),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{len(cases)} fault points of {len(known)}, {len(failures)} failures, {result['seconds']} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
