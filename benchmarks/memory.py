"""What a step's memory consists of: `python -m benchmarks.memory [--models ...] [--engines ...] [--json FILE]`.

Each cell in processes of its own, medians over them, MiB beyond what stood there before the first step:

    tensors    the most that tensors held at once in the first steps, by torch's own count (nothing of the machine in it)
    resident   the peak of the resident set: the memory of `benchmarks.step_time`
    code       pages of files, libraries' machine code, that the steps were the first to read; all processes share them
    rest       resident less code: tensors, what libraries lay out for themselves, what the allocator keeps
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engines import ENGINES
from benchmarks.models import MODELS
from benchmarks.worker import forget_peak, resident

STEPS = 12
PARTS = ("tensors", "resident", "code", "rest")


def cell(model: str, engine: str) -> dict[str, float]:
    """Measure in this process, which must be fresh. MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    step = ENGINES[engine](MODELS[model])
    forget_peak()
    before, code = resident("VmRSS"), resident("RssFile")
    for _ in range(STEPS):
        step()
    peak, code = resident("VmHWM") - before, resident("RssFile") - code
    found = {"tensors": most_held(ENGINES[engine](MODELS[model])), "resident": peak, "code": code, "rest": peak - code}
    return {part: amount / 2**20 for part, amount in found.items()}


def most_held(step: Callable[[], object]) -> int:
    """The most bytes that tensors take at once in a first and a second step: what the first keeps for the second counts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        for _ in range(2):
            step()
    profiler: Any = watched.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma separated")
    parser.add_argument("--engines", default="plain,plain-tuned,privgrad-flat,privgrad-layerwise")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(cell(*arguments.cell)))
        return
    rows = []
    for model in arguments.models.split(","):
        for engine in arguments.engines.split(","):
            command = [sys.executable, "-m", "benchmarks.memory", "--cell", model, engine]
            found = [
                json.loads(
                    subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
                )
                for _ in range(arguments.rounds)
            ]
            row = {part: statistics.median(one[part] for one in found) for part in PARTS}
            rows.append({"model": model, "engine": engine, **row})
            print(f"{model:<14} {engine:<20}" + "  ".join(f"{part} {row[part]:.1f}" for part in PARTS), flush=True)
    if arguments.json:
        command_line = f"python -m benchmarks.memory --rounds {arguments.rounds}"
        for name in ("models", "engines"):
            if getattr(arguments, name) != parser.get_default(name):
                command_line += f" --{name} {getattr(arguments, name)}"
        about = f"torch {torch.__version__}, 1 thread, {STEPS} steps"
        arguments.json.write_text(json.dumps({"command": command_line, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
