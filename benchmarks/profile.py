"""Where a private step's time goes, beside the plain step: `python -m benchmarks.profile [--engine NAME] [--json FILE]`.

Both steps take turns in one process, which keeps its pages. Times are medians over rounds, in milliseconds; what the parts
leave of the whole is the rest: the optimizer, sums of zeros, Python.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.engines import ENGINES, LEARNING_RATE
from benchmarks.models import MODELS, Bench
from privgrad.gradients.collector import Collector
from privgrad.gradients.memory import keep_pages
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.noise import GaussianNoise

PARTS: dict[str, tuple[Any, str]] = {
    "forward": (OnePassEngine, "_forward"),
    "backward": (torch.autograd, "grad"),
    "weight gradients and norms": (Collector, "deliver"),
    "weighted sums": (Collector, "_settle"),
    "noise": (GaussianNoise, "add"),
}
WARM_UP = 3


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the seconds that each of PARTS takes meanwhile."""

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - begun

        return call

    originals = {name: getattr(owner, attribute) for name, (owner, attribute) in PARTS.items()}
    for name, (owner, attribute) in PARTS.items():
        setattr(owner, attribute, watched(name, originals[name]))
    try:
        yield
    finally:
        for name, (owner, attribute) in PARTS.items():
            setattr(owner, attribute, originals[name])


def plain(bench: Bench) -> Callable[[], dict[str, float]]:
    """The plain step: the seconds of its forward pass, its backward pass, and all of it."""
    model, (inputs, targets) = bench.make(), bench.batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)

    def step() -> dict[str, float]:
        begun = time.perf_counter()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), targets)
        middle = time.perf_counter()
        torch.autograd.backward(loss)
        late = time.perf_counter()
        optimizer.step()
        return {"forward": middle - begun, "backward": late - middle, "step": time.perf_counter() - begun}

    return step


def measure(name: str, engine: str, rounds: int) -> dict[str, Any]:
    """One model's row."""
    bench = MODELS[name]
    ordinary, private = plain(bench), ENGINES[engine](bench)
    found: dict[str, list[dict[str, float]]] = {"plain": [], "private": []}
    gc.collect()
    gc.disable()  # a full collection costs more than a step, and comes seldom
    for _ in range(WARM_UP + rounds):
        found["plain"].append(ordinary())
        spent: dict[str, float] = defaultdict(float)
        begun = time.perf_counter()
        with timed(spent):
            private()
        found["private"].append({**spent, "step": time.perf_counter() - begun})
    gc.enable()
    row: dict[str, Any] = {"model": name, "batch": len(bench.batch()[0]), "engine": engine}
    for which, steps in found.items():
        kept = steps[WARM_UP:]
        row[which] = {part: 1e3 * statistics.median(step.get(part, 0.0) for step in kept) for part in kept[0]}
    return row


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help="comma separated")
    parser.add_argument("--engine", default="privgrad-flat")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    keep_pages()
    rows = []
    for name in arguments.models.split(","):
        row = measure(name, arguments.engine, arguments.rounds)
        rows.append(row)
        for which in ("plain", "private"):
            print(
                f"{name:<14} {which:<8} " + "  ".join(f"{part} {ms:.1f}" for part, ms in row[which].items()), flush=True
            )
    if arguments.json:
        command = f"python -m benchmarks.profile --engine {arguments.engine} --rounds {arguments.rounds}"
        about = f"torch {torch.__version__}, 1 thread"
        arguments.json.write_text(json.dumps({"command": command, "about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
