"""Does the price of privacy grow with the batch, the depth or the width? `python -m benchmarks.scaling [--json FILE]`.

Time and memory of flat and layerwise clipping as ratios to the plain step, for one tower of convolutions of which one number at a
time changes. Processes take turns as in `benchmarks.step_time`.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch

from benchmarks.models import SCALES
from benchmarks.step_time import measure, rows_of

ENGINES = ["plain", "plain-tuned", "privgrad-flat", "privgrad-layerwise"]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    rows = []
    for name, bench in SCALES.items():
        rows += rows_of(name, len(bench.batch()[0]), measure(name, ENGINES, arguments.rounds, 1))
        mine = [row for row in rows if row["model"] == name]
        shown = "  ".join(f"{row['engine']} {row['time_ratio']:.2f} / {row['memory_ratio']:.2f}" for row in mine)
        print(f"{name:<10} {shown}", flush=True)
    if arguments.json:
        command = f"python -m benchmarks.scaling --rounds {arguments.rounds}"
        about = f"torch {torch.__version__}, 1 thread, {platform.machine()}"
        arguments.json.write_text(json.dumps({"command": command, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
