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
from tests.mutants.runner import KILLERS, ROOT, TIMEOUT, judge, remembered, run


def main() -> int:
    """Run all mutants, and the same tests without any mutant (they must be green). Exit code 1 where one survives."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object, last on standard output")
    parser.add_argument("--only", help="run the mutants whose name contains this")
    parser.add_argument(
        "--skip-baseline", action="store_true", help="the tests were just seen to be green without mutants"
    )
    parser.add_argument("--remember", action="store_true", help="write down which test killed each, to run it first")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not arguments.only or arguments.only in mutant.name]
    if not chosen:
        raise SystemExit(f"no mutant's name contains {arguments.only!r}")
    os.environ["OMP_NUM_THREADS"] = "1"
    if not arguments.skip_baseline:
        needed = tuple(sorted({test for mutant in chosen for test in mutant.tests}))
        print(f"{len(chosen)} mutants; first the same tests without any", file=sys.stderr, flush=True)
        failed, test = run(needed, ROOT / "src", timeout=10 * TIMEOUT)
        if failed:
            raise SystemExit(f"the tests fail without any mutant ({test}); mend them first")

    survivors: list[str] = []
    killers = {mutant.name: remembered().get(mutant.name) for mutant in MUTANTS}
    with ThreadPoolExecutor(arguments.workers) as pool:
        verdicts = pool.map(judge, chosen, [killers[mutant.name] for mutant in chosen])
        for number, (mutant, verdict) in enumerate(zip(chosen, verdicts, strict=True), start=1):
            word = "killed  " if verdict.killed else "SURVIVED"
            print(f"{number}/{len(chosen)} {word} {verdict.seconds:4.0f} s {mutant.name}", file=sys.stderr, flush=True)
            killers[mutant.name] = verdict.killer
            if not verdict.killed:
                survivors.append(mutant.name)
    if arguments.remember:
        known = {name: killer for name, killer in killers.items() if killer is not None}
        KILLERS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
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
