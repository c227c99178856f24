"""Apply privacy mutants one at a time and see whether the suite turns red: `python -m tests.mutants [--json] [--only NAME]`.

Each mutant is a small edit that breaks a guarantee, with the tests that should kill it. It is applied to a copy of the tree,
never to the checkout. A survivor means that a guarantee rests on nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

from tests.mutants.catalogue import MUTANTS
from tests.mutants.runner import ROOT, TIMEOUT, killed, run


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
    os.environ["OMP_NUM_THREADS"] = "1"
    if not arguments.skip_baseline:
        needed = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
        print(f"{len(chosen)} mutants; first the same tests without any", file=sys.stderr, flush=True)
        if run(needed, ROOT / "src", timeout=10 * TIMEOUT):
            raise SystemExit("the tests fail without any mutant; mend them first")

    survivors: list[str] = []
    with ThreadPoolExecutor(arguments.workers) as pool:
        for number, (mutant, (dead, seconds)) in enumerate(zip(chosen, pool.map(killed, chosen), strict=True), start=1):
            print(
                f"{number}/{len(chosen)} {'killed  ' if dead else 'SURVIVED'} {seconds:4.0f} s {mutant.name}",
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
