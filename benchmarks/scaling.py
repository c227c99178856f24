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
from benchmarks.step_time import measure

ENGINES = ["plain", "privgrad-flat", "privgrad-layerwise"]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    results = {}
    for name in SCALES:
        rows = measure(name, ENGINES, arguments.rounds, 1)
        base = rows["plain"]
        results[name] = {
            engine: {
                "time_ratio": row["seconds"] / base["seconds"],
                "memory_ratio": row["memory"] / base["memory"],
                "seconds": row["seconds"],
            }
            for engine, row in rows.items()
        }
        shown = "  ".join(
            f"{engine} {row['time_ratio']:.2f} / {row['memory_ratio']:.2f}" for engine, row in results[name].items()
        )
        print(f"{name:<10} {shown}", flush=True)
    if arguments.json:
        about = f"torch {torch.__version__}, 1 thread, {platform.machine()}"
        arguments.json.write_text(
            json.dumps({"about": about, "rounds": arguments.rounds, "models": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
