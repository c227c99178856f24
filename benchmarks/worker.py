"""One cell of the table, in a process of its own: prints "ready" or why not, then a line of numbers for every line it reads."""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import torch

from benchmarks.engines import ENGINES, SkippedError
from benchmarks.models import MODELS, SCALES

_STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since `forget_peak`), from Linux."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"{_STATUS} has no {field}")


def forget_peak() -> None:
    """Start the high-water mark anew: imports may have stood higher than the steps."""
    Path("/proc/self/clear_refs").write_text("5")


def main(model: str, engine: str, threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    try:
        step = ENGINES[engine]({**MODELS, **SCALES}[model])
    except SkippedError as reason:
        print(json.dumps({"skipped": str(reason)}), flush=True)
        return
    forget_peak()
    before = resident("VmRSS")
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        step()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        print(json.dumps({"wall": wall, "cpu": cpu, "memory": resident("VmHWM") - before}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
