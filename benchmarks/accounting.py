"""What accounting costs, and what it answers: `python -m benchmarks.accounting`. Poisson sampling, Gaussian noise, add/remove.

privgrad (PLD on the fine grid) beside dp-accounting as it comes and Opacus's accountants, where Opacus is installed. Every engine
answers each question `rounds` times, in turns; times are medians. epsilon of a fixed noise, then the noise for an epsilon.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

import privgrad as pg
from privgrad.privacy import accounting

DELTA, TARGET = 1e-5, 3.0
QUESTIONS = ((0.01, 1.0, 1_000), (0.01, 1.0, 10_000), (0.001, 0.6, 100_000), (0.1, 4.0, 2_000))
"""Sampling rate, noise multiplier, steps."""


def _plan(rate: float, multiplier: float | None, steps: int) -> pg.Plan:
    return pg.Plan(
        sampling=pg.PoissonSampling(rate=rate, divisor=1.0),
        steps=steps,
        noise=pg.GaussianNoise(multiplier=multiplier),
        adjacency=pg.Adjacency.ADD_REMOVE,
        delta=DELTA,
    )


def _peer(accountant: Callable[[], Any]) -> tuple[Callable[..., float], Callable[..., float]]:
    def event(rate: float, multiplier: float, steps: int) -> Any:
        sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
        return dp_accounting.SelfComposedDpEvent(sampled, steps)

    def epsilon(rate: float, multiplier: float, steps: int) -> float:
        return float(accountant().compose(event(rate, multiplier, steps)).get_epsilon(DELTA))

    def noise(rate: float, steps: int) -> float:
        found = dp_accounting.calibrate_dp_mechanism(accountant, lambda z: event(rate, z, steps), TARGET, DELTA)
        return float(found)

    return epsilon, noise


def _opacus(name: str) -> tuple[Callable[..., float], Callable[..., float]]:
    from opacus.accountants import create_accountant
    from opacus.accountants.utils import get_noise_multiplier

    def epsilon(rate: float, multiplier: float, steps: int) -> float:
        accountant = create_accountant(name)
        accountant.history = [(multiplier, rate, steps)]
        return float(accountant.get_epsilon(DELTA))

    def noise(rate: float, steps: int) -> float:
        found = get_noise_multiplier(
            target_epsilon=TARGET, target_delta=DELTA, sample_rate=rate, steps=steps, accountant=name
        )
        return float(found)

    return epsilon, noise


def engines() -> dict[str, tuple[Callable[..., float], Callable[..., float]]]:
    """{name: (epsilon of a noise multiplier, noise multiplier of an epsilon)}."""

    def noise(rate: float, steps: int) -> float:
        multiplier = _plan(rate, None, steps).calibrate(TARGET).noise.multiplier
        assert multiplier is not None
        return multiplier

    found = {
        "privgrad": (lambda rate, multiplier, steps: _plan(rate, multiplier, steps).epsilon(), noise),
        "dp-accounting PLD": _peer(PLDAccountant),
        "dp-accounting RDP": _peer(RdpAccountant),
    }
    if importlib.util.find_spec("opacus") is not None:
        found |= {"Opacus RDP": _opacus("rdp"), "Opacus PRV": _opacus("prv")}
    return found


def _forget() -> None:
    """privgrad remembers what it was asked before; a benchmark asks anew."""
    for function in vars(accounting).values():
        if hasattr(function, "cache_clear"):
            function.cache_clear()


def measure(rounds: int) -> list[dict[str, Any]]:
    """A row for every engine and question."""
    asked = engines()
    times: dict[tuple[str, int, str], list[float]] = {}
    answers: dict[tuple[str, int, str], float] = {}
    for _ in range(rounds):
        for number, (rate, multiplier, steps) in enumerate(QUESTIONS):
            for name, (epsilon, noise) in asked.items():
                works = {
                    "epsilon": partial(epsilon, rate, multiplier, steps),
                    "noise_multiplier": partial(noise, rate, steps),
                }
                for what, work in works.items():
                    _forget()
                    begun = time.perf_counter()
                    answers[name, number, what] = work()
                    times.setdefault((name, number, what), []).append(time.perf_counter() - begun)
    return [
        {
            "engine": name,
            "rate": QUESTIONS[number][0],
            "steps": QUESTIONS[number][2],
            "noise_multiplier_given": QUESTIONS[number][1],
            **{what: answers[name, number, what] for what in ("epsilon", "noise_multiplier")},
            **{
                f"{what}_seconds": statistics.median(times[name, number, what])
                for what in ("epsilon", "noise_multiplier")
            },
        }
        for number in range(len(QUESTIONS))
        for name in asked
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = measure(options.rounds)
    for row in rows:
        print(
            f"{row['engine']:18s} q {row['rate']:<6g} T {row['steps']:<7d} epsilon {row['epsilon']:8.4f} "
            f"({1e3 * row['epsilon_seconds']:7.0f} ms)   z for {TARGET:g}: {row['noise_multiplier']:7.4f} "
            f"({1e3 * row['noise_multiplier_seconds']:7.0f} ms)"
        )
    if options.json is not None:
        command = f"python -m benchmarks.accounting --rounds {options.rounds}"
        options.json.write_text(
            json.dumps({"command": command, "delta": DELTA, "target": TARGET, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
