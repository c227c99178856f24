"""Step time and peak memory of every engine, as ratios to the same step without privacy: `python -m benchmarks.step_time`.

Each (model, engine) runs in a process of its own. The processes take turns, one step each, round by round, so that a machine
that becomes slower becomes slower for all of them. Time: the median over rounds, of wall clock and of CPU time. Memory: the
peak of the resident set over all steps, less what was resident before the first.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import ENGINES
from benchmarks.models import MODELS

WARM_UP = 2


class Worker:
    """A cell's process. skipped: why it cannot run, or None."""

    def __init__(self, model: str, engine: str, threads: int) -> None:
        command = [sys.executable, "-m", "benchmarks.worker", model, engine, str(threads)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.skipped: str | None = self._read().get("skipped")
        self.steps: list[dict[str, float]] = []

    def step(self) -> None:
        """One step, timed."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        self.steps.append(self._read())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            return {"skipped": "it failed; its error is above"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def measure(model: str, engines: list[str], rounds: int, threads: int) -> dict[str, dict[str, Any]]:
    """{engine: its row} for one model."""
    workers = {engine: Worker(model, engine, threads) for engine in engines}
    for _ in range(WARM_UP + rounds):
        for worker in workers.values():
            if worker.skipped is None:
                worker.step()
                worker.skipped = worker.steps[-1].get("skipped")  # type: ignore[assignment]
    for worker in workers.values():
        worker.close()
    return {engine: _row(worker) for engine, worker in workers.items()}


def _row(worker: Worker) -> dict[str, Any]:
    if worker.skipped is not None:
        return {"skipped": worker.skipped}
    wall = [step["wall"] for step in worker.steps[WARM_UP:]]
    quartiles = statistics.quantiles(wall, n=4) if len(wall) > 1 else [wall[0]] * 3
    return {
        "seconds": statistics.median(wall),
        "quartiles": [quartiles[0], quartiles[2]],
        "cpu_seconds": statistics.median(step["cpu"] for step in worker.steps[WARM_UP:]),
        "memory": max(step["memory"] for step in worker.steps),
    }


def rows_of(model: str, batch: int, measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each engine, with its ratios to the plain step; or what it was skipped for."""
    base = measured["plain"]
    rows = []
    for engine, numbers in measured.items():
        row = {"model": model, "batch": batch, "engine": engine}
        if "skipped" not in numbers:
            row["time_ratio"] = numbers["seconds"] / base["seconds"]
            row["cpu_time_ratio"] = numbers["cpu_seconds"] / base["cpu_seconds"]
            row["memory_ratio"] = numbers["memory"] / base["memory"]
        rows.append({**row, **numbers})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One model's rows, a line each."""
    title = f"{rows[0]['model']} [{rows[0]['batch']}]"
    lines = [title.ljust(24) + "time    cpu  memory   seconds (quartiles)      MiB"]
    for row in rows:
        if "skipped" in row:
            lines.append(f"  {row['engine']:<20} skipped: {row['skipped']}")
            continue
        low, high = row["quartiles"]
        lines.append(
            f"  {row['engine']:<20}"
            + "".join(f"{row[key]:7.2f}" for key in ("time_ratio", "cpu_time_ratio", "memory_ratio"))
            + f"   {row['seconds']:.3f} ({low:.3f}-{high:.3f})   {row['memory'] / 2**20:7.0f}"
        )
    return "\n".join(lines)


def _chosen(given: str, known: dict[str, Any]) -> list[str]:
    names = given.split(",") if given else list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help=f"comma separated, of: {', '.join(MODELS)}")
    parser.add_argument("--engines", default="", help=f"comma separated, of: {', '.join(ENGINES)}")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="threads of every process")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    engines = _chosen(arguments.engines, ENGINES)
    engines = ["plain", *(engine for engine in engines if engine != "plain")]

    allocator = " ".join(filter(None, platform.libc_ver())) or "the system's"
    about = f"torch {torch.__version__}, {arguments.threads} thread(s), allocator: malloc of {allocator}, {platform.machine()}"
    print(about, flush=True)
    rows = []
    for model in _chosen(arguments.models, MODELS):
        measured = measure(model, engines, arguments.rounds, arguments.threads)
        rows += rows_of(model, len(MODELS[model].batch()[0]), measured)
        print(table([row for row in rows if row["model"] == model]), flush=True)
    if arguments.json:
        command = " ".join(["python -m benchmarks.step_time", *sys.argv[1:]])
        arguments.json.write_text(json.dumps({"command": command, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
