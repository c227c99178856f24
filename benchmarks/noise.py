"""The price of noise: cryptographic against torch's generator, as a share of a private step: `python -m benchmarks.noise`.

For every model: a whole private step (clipped sum, ledger, cryptographic noise, optimizer), and drawing that step's noise alone
with either generator, in turns. Time: the median over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engines import private
from benchmarks.models import MODELS
from privgrad.mechanism.randomness import SecureSource


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall clock."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def measure(name: str, rounds: int) -> dict[str, Any]:
    """One model's row."""
    bench = MODELS[name]
    step = private(bench)
    count = sum(parameter.numel() for parameter in bench.make().parameters())
    wide, buffer, secure = torch.empty(count, dtype=torch.float64), torch.empty(count), SecureSource()
    works = {"step": step, "secure": lambda: secure.normal_(wide), "fast": lambda: buffer.normal_()}
    times: dict[str, list[float]] = {key: [] for key in works}
    for _ in range(2 + rounds):
        for key, work in works.items():
            times[key].append(timed(work))
    step_s, secure_s, fast_s = (statistics.median(times[key][2:]) for key in ("step", "secure", "fast"))
    return {
        "model": name,
        "batch": len(bench.batch()[0]),
        "parameters": count,
        "step_seconds": step_s,
        "secure_nanoseconds_per_number": 1e9 * secure_s / count,
        "fast_nanoseconds_per_number": 1e9 * fast_s / count,
        "secure_share_of_step": secure_s / step_s,
        "fast_share_of_step_with_fast_noise": fast_s / (step_s - secure_s + fast_s),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma separated")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    print(
        "model                batch  parameters   step s   secure ns   fast ns   secure share   fast share", flush=True
    )
    for name in arguments.models.split(","):
        row = measure(name, arguments.rounds)
        rows.append(row)
        print(
            f"{name:<20} {row['batch']:5d} {row['parameters']:11,d} {row['step_seconds']:8.3f} "
            f"{row['secure_nanoseconds_per_number']:11.1f} {row['fast_nanoseconds_per_number']:9.1f} "
            f"{row['secure_share_of_step']:14.1%} {row['fast_share_of_step_with_fast_noise']:12.1%}",
            flush=True,
        )
    if arguments.json:
        about = f"torch {torch.__version__}, {arguments.threads} thread(s)"
        command = f"python -m benchmarks.noise --threads {arguments.threads} --rounds {arguments.rounds}"
        arguments.json.write_text(json.dumps({"command": command, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
