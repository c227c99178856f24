"""Apply privacy mutants one at a time and see whether the suite turns red: `python -m tests.mutants [--json] [--only NAME]`.

Each mutant is a small edit that breaks a guarantee, with the tests that should kill it. It is applied to a copy of the tree,
never to the checkout. A survivor means that a guarantee rests on nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutants.catalogue import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 300


def apply(mutant: Mutant, source: Path) -> None:
    """Edit the copy. The text to replace must occur exactly once: a mutant that no longer applies is an error, not a kill."""
    path = source / "privgrad" / mutant.file
    text = path.read_text()
    if text.count(mutant.before) != 1:
        raise SystemExit(
            f"mutant {mutant.name!r} no longer applies: {mutant.file} holds its text {text.count(mutant.before)} times"
        )
    path.write_text(text.replace(mutant.before, mutant.after))


def run(tests: tuple[str, ...], source: Path, timeout: int = TIMEOUT) -> bool:
    """True where the tests fail, or do not end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return True
    if done.returncode not in (0, 1):
        # Not red but broken: nothing was collected, or pytest itself fell over.
        raise SystemExit(f"pytest ended with {done.returncode} on {tests}:\n{done.stdout.decode()[-2000:]}")
    return done.returncode == 1


def killed(mutant: Mutant) -> bool:
    """Whether the suite finds one mutant."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        apply(mutant, source)
        return run(mutant.tests, source)


def main() -> int:
    """Run all mutants, and the same tests without any mutant (they must be green). Exit code 1 where one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object, last on standard output")
    parser.add_argument("--only", help="run the mutants whose name contains this")
    parser.add_argument(
        "--skip-baseline", action="store_true", help="the tests were just seen to be green without mutants"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.only or arguments.only in mutant.name]
    if not chosen:
        raise SystemExit(f"no mutant's name contains {arguments.only!r}")
    if not arguments.skip_baseline:
        needed = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
        print(f"{len(chosen)} mutants; first the same tests without any", file=sys.stderr, flush=True)
        if run(needed, ROOT / "src", timeout=10 * TIMEOUT):
            raise SystemExit("the tests fail without any mutant; mend them first")

    survivors: list[str] = []
    with ThreadPoolExecutor(arguments.workers) as pool:
        for number, (mutant, dead) in enumerate(zip(chosen, pool.map(killed, chosen), strict=True), start=1):
            print(
                f"{number}/{len(chosen)} {'killed  ' if dead else 'SURVIVED'} {mutant.name}",
                file=sys.stderr,
                flush=True,
            )
            if not dead:
                survivors.append(mutant.name)
    score = {"killed": len(chosen) - len(survivors), "total": len(chosen), "survivors": survivors}
    if arguments.json:
        print(json.dumps(score))
    else:
        print(
            f"{score['killed']} of {score['total']} mutants killed"
            + "".join(f"\n  survived: {name}" for name in survivors)
        )
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
