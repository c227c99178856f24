"""One-run audits of a small training at claimed epsilon 4: `python -m tests.audit.one_run [--json PATH]`.

Twenty trainings with Dirac canaries, for each of a few plans; what the median shows, and whether all stay below the claim.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

import privgrad as pg
from privgrad.audit.one_run import GUESS_FRACTION, OneRunAudit, audit_run
from privgrad.mechanism.plan import Plan

RESULTS = Path(__file__).resolve().parents[1] / "results" / "one_run.json"
EPSILON, CANARIES, REPETITIONS = 4.0, 10_000, 20


def plans() -> dict[str, Plan]:
    """A few small trainings; those on full batches are Gaussian, for which much more can be shown."""
    full, poisson = pg.FullBatch(divisor=100.0), pg.PoissonSampling(rate=0.5, divisor=100.0)
    return {
        "full batch, 10 steps": pg.Plan(sampling=full, steps=10),
        "full batch, 10 steps, replace_one": pg.Plan(sampling=full, steps=10, adjacency=pg.Adjacency.REPLACE_ONE),
        "Poisson at 1/2, 30 steps": pg.Plan(sampling=poisson, steps=30),
    }


def audited(plan: Plan, canaries: int = CANARIES, seed: int | None = None) -> OneRunAudit:
    """One training of a small network beside so many canaries."""
    network = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3))
    records = torch.randn(100, 20), torch.randint(3, (100,))
    loss_fn = pg.supervised(nn.functional.cross_entropy)
    return audit_run(plan, canaries=canaries, model=network, loss_fn=loss_fn, companions=records, seed=seed)


@dataclass(frozen=True)
class Summary:
    """Of some repetitions of one training. median_gaussian: where the training is a Gaussian mechanism."""

    plan: str
    claimed: float
    noise_multiplier: float
    canaries: int
    guess_fraction: float
    repetitions: int
    held: int
    median: float
    smallest: float
    largest: float
    median_gaussian: float | None
    largest_gaussian: float | None


def summary(name: str, plan: Plan, repetitions: int = REPETITIONS) -> Summary:
    """Train so many times, with fresh coins and fresh noise."""
    calibrated = plan.calibrate(EPSILON)
    found = [audited(calibrated) for _ in range(repetitions)]
    shown = [audit.epsilon_lower for audit in found]
    gaussian = [audit.epsilon_lower_gaussian for audit in found if audit.epsilon_lower_gaussian is not None]
    claimed = found[0].epsilon_claimed or 0.0
    return Summary(
        plan=name,
        claimed=claimed,
        noise_multiplier=float(calibrated.noise.multiplier or 0.0),
        canaries=CANARIES,
        guess_fraction=GUESS_FRACTION,
        repetitions=repetitions,
        held=sum(0 <= audit.epsilon_lower <= claimed and 0 <= audit.best <= claimed for audit in found),
        median=median(shown),
        smallest=min(shown),
        largest=max(shown),
        median_gaussian=median(gaussian) if gaussian else None,
        largest_gaussian=max(gaussian) if gaussian else None,
    )


def main() -> None:
    """Run them all, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the results go")
    path: Path = parser.parse_args().json
    rows: list[dict[str, Any]] = []
    for name, plan in plans().items():
        found = summary(name, plan)
        rows.append(vars(found))
        print(
            f"{name}: {found.held} of {found.repetitions} below the claim, median {found.median:.2f}", file=sys.stderr
        )
    path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
