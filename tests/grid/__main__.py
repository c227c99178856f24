"""Try every combination: `python -m tests.grid` writes tests/results/grid.json and docs/combinations.md."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.grid import (
    CLIPPING,
    GROUPS,
    MIXING,
    SAMPLERS,
    STATISTICS,
    THRESHOLDS,
    promises,
    stages,
    statistics,
    try_out,
    write_data,
)

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "tests" / "results" / "grid.json", ROOT / "docs" / "combinations.md"
ADJACENCIES, ACCOUNTANTS = ("zero_out", "add_remove", "replace_one"), ("pld", "rdp")
Row = dict[str, Any]


def main() -> None:
    """Run it; minutes. Stops at the first combination that neither trains nor is refused in words."""
    started = time.monotonic()
    results: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_data(directory)
        for kind, cells in (("stages", stages()), ("promises", promises()), ("statistics", statistics())):
            rows = results[kind] = []
            for number, cell in enumerate(cells, 1):
                rows.append({**asdict(cell), **asdict(try_out(cell, directory))})
                if number % 20 == 0 or number == len(cells):
                    elapsed = time.monotonic() - started
                    print(f"{kind}: {number}/{len(cells)}, {elapsed:.0f} s", file=sys.stderr)
    RESULTS.write_text(json.dumps(results, indent=None).replace("}, {", "},\n{") + "\n")
    PAGE.write_text(page(results))


def page(results: dict[str, list[Row]]) -> str:
    """docs/combinations.md."""
    reasons: list[str] = []
    rows = results["stages"]
    table = _table(
        [f"{groups}; thresholds {thresholds}" for groups in GROUPS for thresholds in THRESHOLDS],
        list(CLIPPING),
        lambda row: (f"{row['groups']}; thresholds {row['thresholds']}", row["clipping"]),
        rows,
        reasons,
    )
    promised = _table(
        [f"{sampler}, {accountant}" for sampler in SAMPLERS for accountant in ACCOUNTANTS],
        list(ADJACENCIES),
        lambda row: (f"{row['sampler']}, {row['accountant']}", row["adjacency"]),
        results["promises"],
        reasons,
    )
    taken = _table(
        [f"{name}; thresholds {thresholds}" for name in GROUPS for thresholds in THRESHOLDS]
        + [f"{name}; modelmix" for name in GROUPS],
        list(STATISTICS),
        lambda row: (
            f"{row['groups']}; " + (f"thresholds {row['thresholds']}" if row["mixing"] == MIXING[0] else row["mixing"]),
            row["statistics"],
        ),
        results["statistics"],
        reasons,
    )
    count = sum(len(found) for found in results.values())
    each = len(rows) // (len(GROUPS) * len(THRESHOLDS) * len(CLIPPING))
    notes = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    return f"""# What goes with what

Written by `python -m tests.grid` ([results](../tests/results/grid.json)): {count} configurations, each asked for its
epsilon (`privgrad epsilon CONFIG --json`) and trained for two steps on digits (`privgrad train CONFIG --json`). Both commands
gave the same epsilon, or refused with the same words. A cell counts the combinations that trained.

## Stages

Under zero_out. Each cell holds {each} combinations: examples or users protected, five samplers, three allocations of the
noise.

{table}

## Promises

Each cell holds 4 combinations: examples or users protected, clipped one by one or in groups.

{promised}

## Statistics of normalization layers

Under zero_out. Each cell holds 10 combinations (those with modelmix 4): examples or users protected, five samplers (with modelmix
Poisson and full batch). Where groups are clipped the layers are BatchNorm.

{taken}

{notes}
"""


def _table(
    lines: Sequence[str],
    columns: Sequence[str],
    place: Callable[[Row], tuple[str, str]],
    rows: Sequence[Row],
    reasons: list[str],
) -> str:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(place(row), []).append(row)
    written = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for line in lines:
        cells = []
        for column in columns:
            inside = found[line, column]
            trained = sum(row["epsilon"] is not None for row in inside)
            numbers = sorted({_number(row["reason"], reasons) for row in inside if row["reason"]})
            cells.append(" ".join(([f"{trained} trained"] if trained else []) + [f"refused ({n})" for n in numbers]))
        written.append(f"| {line} | " + " | ".join(cells) + " |")
    return "\n".join(written)


def _number(reason: str, reasons: list[str]) -> int:
    if reason not in reasons:
        reasons.append(reason)
    return reasons.index(reason) + 1


if __name__ == "__main__":
    main()
