"""The table of audits: `python -m tests.audit.table` writes tests/results/audit.json and docs/audits.md.

Every mechanism of the library, and every combination of two that a plan accepts, is attacked for one step; those to which it
applies also for a whole training. Combinations that a plan refuses say why.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from scipy.stats import norm

import privgrad as pg
from privgrad.audit.mixing import audit_mixing
from privgrad.audit.one_run import audit_run
from privgrad.audit.worst import audit_plan, worst_pair
from privgrad.errors import PrivgradError
from privgrad.mechanism.plan import Plan
from tests.audit import one_run

ROOT = Path(__file__).resolve().parents[2]
RESULTS, PAGE = ROOT / "tests" / "results" / "audit.json", ROOT / "docs" / "audits.md"
MULTIPLIER, ALONE, MET, MET_IN_PAIRS, MIXED, MIXED_ALONE = 0.35, 5000, 1200, 500, 20_000, 5000
"""z; trials in each world where canaries stand side by side, where they meet (one by one), and of mixing in both cases."""
CONFIDENCE, TIGHT = 1 - 1e-6, 0.8
ONE_RUN_EPSILON, ONE_RUN_STEPS, ONE_RUN_CANARIES = 4.0, 10, 10_000
Row = dict[str, Any]

STAGES: Mapping[str, tuple[str, Any]] = {
    "flat clipping": ("clipping", pg.FlatClipping(0.7)),
    "l2 and l-infinity clipping": ("clipping", pg.CoordinateClipping(0.7, p=16.0)),
    "layerwise clipping": ("clipping", pg.LayerwiseClipping((0.2, 1.0, 3.0))),
    "automatic clipping": ("clipping", pg.AutomaticClipping(0.7, blocks="tensor")),
    "groups": ("groups", pg.RandomGroups(4)),
    "groups, local steps": ("groups", pg.RandomGroups(4, local_steps=3, local_rate=0.1)),
    "sparsified, elements": ("compression", pg.RandomSparsification(0.7)),
    "sparsified, rows": ("compression", pg.RandomSparsification(0.7, structure="rows")),
    "sparsified, layers": ("compression", pg.RandomSparsification(0.7, structure="layers")),
    "sparsified, blocks": ("compression", pg.RandomSparsification(0.7, structure="blocks", block=4)),
    "public thresholds": ("thresholds", pg.PublicThresholds()),
    "private thresholds": ("thresholds", pg.PrivateThresholds(limit=2.0)),
    "quantile thresholds": ("thresholds", pg.QuantileThresholds()),
    "noise per layer": ("noise", pg.GaussianNoise(multiplier=MULTIPLIER, allocation="per_layer")),
    "noise by dimension": ("noise", pg.GaussianNoise(multiplier=MULTIPLIER, allocation="dimension")),
    "embedded": ("compression", pg.GradientEmbedding(rank=4)),
    "embedded, joined": ("compression", pg.GradientEmbedding(rank=4, joined=True)),
    "public statistics": ("statistics", pg.PublicStatistics()),
    "private statistics": ("statistics", pg.PrivateStatistics()),
    "ModelMix": ("mixing", pg.ModelMix(width_ratio=0.15)),
    "add_remove": ("adjacency", pg.Adjacency.ADD_REMOVE),
    "replace_one": ("adjacency", pg.Adjacency.REPLACE_ONE),
    "users": ("protects", pg.User("who")),
}
"""Every mechanism that changes what is inside a step, by name: the slot of a plan that it takes, and what goes there."""


def chosen_stages() -> list[tuple[str, ...]]:
    """Every mechanism alone, and every two. (What stands first is the default, and alone in every other plan already.)"""
    return [(name,) for name in STAGES] + list(itertools.combinations(list(STAGES)[1:], 2))


def combined(*names: str) -> Plan | None:
    """The plan with these mechanisms, all else as it is by default. None where two take the same slot.

    Raises:
        PrivgradError: a combination that the plan refuses.
    """
    slots = [STAGES[name][0] for name in names]
    if len(set(slots)) < len(slots):
        return None
    stages: dict[str, Any] = {"clipping": pg.FlatClipping(0.7), "noise": pg.GaussianNoise(multiplier=MULTIPLIER)}
    stages |= {STAGES[name][0]: STAGES[name][1] for name in names}
    return Plan(sampling=pg.PoissonSampling(rate=0.1, divisor=30.0), steps=1, **stages)


def audited(*names: str) -> Row | None:
    """One row: the step audit of the plan with these mechanisms, or the reason why there is none. None: the same slot twice."""
    row: Row = {"mechanisms": list(names), "reason": None}
    try:
        plan = combined(*names)
        if plan is None:
            return None
        one_by_one = MET if len(names) == 1 else MET_IN_PAIRS
        alone = worst_pair(plan).canaries == 1
        if plan.mixing is not None:
            trials = MIXED_ALONE if alone else MIXED
            mixed = audit_mixing(plan, trials=trials, confidence=CONFIDENCE)
            claimed, asserted, tight = mixed.epsilon_claimed, mixed.epsilon_lower, mixed.epsilon_lower_95
            return {
                **row,
                "scale": "epsilon",
                "claimed": claimed,
                "asserted": asserted,
                "lower": tight,
                "trials": trials,
                "delta": mixed.delta,
                "epsilon_claimed": claimed,
                "epsilon_lower": tight,
            }
        found = audit_plan(plan, trials=one_by_one if alone else ALONE, confidence=CONFIDENCE)
        return {
            **row,
            "scale": "mu",
            "claimed": found.mu_claimed,
            "asserted": found.mu_lower,
            "lower": found.mu_lower_95,
            "trials": found.trials,
            "delta": found.delta,
            "epsilon_claimed": found.epsilon_claimed,
            "epsilon_lower": found.epsilon_lower_95,
        }
    except PrivgradError as error:
        return {**row, "reason": str(error)}


def trained(name: str) -> Row:
    """One row: the one-run audit of a whole training on full batches with this mechanism."""
    slot, stage = STAGES[name]
    stages: dict[str, Any] = {"noise": pg.GaussianNoise(), slot: stage}
    if slot == "noise":
        stages["noise"] = pg.GaussianNoise(allocation=stage.allocation)
    if isinstance(stage, pg.LayerwiseClipping):
        stages[slot] = pg.LayerwiseClipping(1.0)  # there is one tensor
    plan = Plan(sampling=pg.FullBatch(divisor=100.0), steps=ONE_RUN_STEPS, **stages)
    if getattr(stage, "needs_public", False):
        return {"mechanism": name, "reason": "it needs public data, and the table of canaries alone has none"}
    if slot == "statistics":
        return {"mechanism": name, "reason": "it needs a layer of the model, and the table of canaries alone has none"}
    found = audit_run(plan.calibrate(ONE_RUN_EPSILON), canaries=ONE_RUN_CANARIES)
    return {
        "mechanism": name,
        "reason": None,
        "claimed": found.epsilon_claimed,
        "lower": found.best,
        "any": found.epsilon_lower,
        "canaries": found.canaries,
        "guesses": found.guesses,
        "correct": found.correct,
    }


def main() -> None:
    """Run it; minutes. Stops at the first audit that refutes its claim."""
    torch.set_num_threads(1)
    started = time.monotonic()
    names = chosen_stages()
    steps: list[Row] = []
    for number, chosen in enumerate(names, 1):
        row = audited(*chosen)
        if row is None:
            continue
        assert row["reason"] or row["asserted"] <= row["claimed"], f"REFUTED: {row}"
        steps.append(row)
        if number % 10 == 0 or number == len(names):
            print(f"{number}/{len(names)}, {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    runs = [trained(name) for name in STAGES]
    results = {"steps": steps, "runs": runs}
    RESULTS.write_text(json.dumps(results).replace("}, {", "},\n{") + "\n")
    PAGE.write_text(page(results))


def smallest_loss_found(trials: int, mu: float) -> float:
    """The share of the noise that must be missing for an audit at CONFIDENCE to refute mu in 99 of 100 cases."""
    for missing in range(1, 100):
        true = mu / (1 - missing / 100)
        rate = norm.cdf(true / 2)
        spread = (rate * (1 - rate) / trials) ** 0.5
        surely = rate - (norm.isf((1 - CONFIDENCE) / 2) + norm.isf(0.005)) * spread
        if surely > 0.5 and 2 * norm.ppf(surely) > mu:
            return missing / 100
    return 1.0


def page(results: Mapping[str, list[Row]]) -> str:
    """docs/audits.md."""
    singles = [row for row in results["steps"] if len(row["mechanisms"]) == 1]
    pairs = [row for row in results["steps"] if len(row["mechanisms"]) == 2]
    passed, refused = [row for row in pairs if not row["reason"]], [row for row in pairs if row["reason"]]
    runs = {row["mechanism"]: row for row in results["runs"]}
    reasons = list(dict.fromkeys(row["reason"] for row in refused))
    gaussian = [row["lower"] / row["claimed"] for row in singles + passed if row["scale"] == "mu"]
    audits = len(singles) + len(passed)
    one = json.loads(one_run.RESULTS.read_text())
    alone, many = (f"{smallest_loss_found(trials, 1 / MULTIPLIER):.0%}" for trials in (ALONE, 60_000))
    first = one[0]
    return f"""# Audits

Written by `python -m tests.audit.table` and `python -m tests.audit.one_run`
([steps](../tests/results/audit.json), [trainings](../tests/results/one_run.json)).

## What an audit shows, and what it does not

An audit attacks the object that runs and turns the attacker's success into a LOWER bound on epsilon, at a stated confidence.
A bound above the claim refutes the claim. A bound below it proves nothing: another attack may show more, and only a proof
([guarantees](guarantees/)) bounds every attack. How near a bound comes to the claim says how large an error would have to be
to be found.

- `privgrad audit CONFIG|RUN --kind step` (`privgrad.audit.worst`; `privgrad.audit.mixing` for ModelMix) runs one step many
  times on a worst pair that is built from the plan, every record in it: it attacks the claimed event. The sampler is tested on
  its own (`tests/mechanism/test_sampling.py`).
- `--kind one-run` (`privgrad.audit.one_run`) trains once with many canaries, beside made-up records, and guesses which were in:
  it attacks the epsilon of the whole training. `audit_training` does so with any training, also of another library
  ([example](../examples/audit_own_training.py)).
- `--kind membership` (`privgrad.audit.membership`) asks a finished model about its records. What it prints, and the
  picture (drawn only where `--picture` asks for one), are not covered by the guarantee, and its bound assumes that members
  and others differ by nothing but the training.

## False alarms and power

A step audit fails where its bound at confidence 1 - 1e-6 exceeds the claim: a false alarm in at most one of a million. Writing
this page takes {audits} of them ({audits * 1e-6:.1e} together); the test suite runs some of them only. Tightness is
reported at 95 %. At z = {MULTIPLIER:g} an audit with
{ALONE:,} trials in each world finds, 99 times in 100, that {alone} of the noise are missing; one with 60,000 trials, {many}.
Errors of the noise's scale itself are found sooner, by the tests of its distribution (`tests/mechanism/test_noise.py`).

## Every mechanism

z = {MULTIPLIER:g}. Step: mu of one step (for ModelMix epsilon at its delta), lower bound at 95 %. Training: epsilon at
delta = 1e-5 of {ONE_RUN_STEPS} full-batch steps calibrated to {ONE_RUN_EPSILON:g}, {ONE_RUN_CANARIES:,} Dirac canaries, bound
at 95 % (f-DP; for ModelMix the one for every mechanism). A Dirac canary pulls one coordinate, so that it is weak where
coordinates are cut, groups are clipped, or a mask hides it.

| mechanism | step: claimed | shown | tightness | trials | training: claimed | shown |
|---|---|---|---|---|---|---|
{_lines(_line(row, runs[row["mechanisms"][0]]) for row in singles)}

## Small trainings at epsilon {one_run.EPSILON:g}

A small network beside {first["canaries"]:,} canaries, guesses about {first["guess_fraction"]:.0%} of them (fixed beforehand),
{first["repetitions"]} trainings each.

| training | claimed | within 0 and the claim | median, any mechanism (Steinke) | median, Gaussian (f-DP) | largest |
|---|---|---|---|---|---|
{_lines(map(_repeated, one))}

## Every two mechanisms

{len(passed)} combinations that a plan accepts, none refuted; Gaussian ones show {min(gaussian):.0%} to {max(gaussian):.0%} of
mu (least where a mask of layers meets layerwise clipping: a masked layer's share is charged, and moves
nothing). {len(refused)} are refused by the plan. A cell is shown / claimed of the step; a number in brackets is the reason
below; a dot: both take the same place in a plan.

{_grid(results["steps"], reasons)}

{_lines(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))}
"""


def _lines(rows: Iterable[str]) -> str:
    return "\n".join(rows)


def _line(row: Row, run: Row) -> str:
    whole = "| |" if run["reason"] else f"{run['claimed']:.2f} | {run['lower']:.2f} |"
    what = row["mechanisms"][0]
    scale = "" if row["scale"] == "mu" else f" (epsilon at {row['delta']:g})"
    tightness = row["lower"] / row["claimed"]
    return (
        f"| {what} | {row['claimed']:.2f}{scale} | {row['lower']:.2f} | {tightness:.0%} | {row['trials']:,} | {whole}"
    )


def _repeated(row: Row) -> str:
    gaussian = "" if row["median_gaussian"] is None else f"{row['median_gaussian']:.2f}"
    largest = max(row["largest"], row["largest_gaussian"] or 0.0)
    held = f"{row['held']} of {row['repetitions']}"
    return f"| {row['plan']} | {row['claimed']:.2f} | {held} | {row['median']:.2f} | {gaussian} | {largest:.2f} |"


def _grid(rows: list[Row], reasons: list[str]) -> str:
    names = list(STAGES)[1:]
    numbers = "".join(f" {number} |" for number in range(1, len(names)))
    lines = [f"| |{numbers}", "|---" * len(names) + "|"]
    found = {frozenset(row["mechanisms"]): row for row in rows}
    for place, name in enumerate(names):
        cells = [_cell(found.get(frozenset((name, other))), reasons) for other in names[:place]]
        lines.append(f"| {place + 1} {name} | " + " | ".join(cells + [""] * (len(names) - 1 - place)) + " |")
    return "\n".join(lines)


def _cell(row: Row | None, reasons: list[str]) -> str:
    if row is None:
        return "·"
    return f"({reasons.index(row['reason']) + 1})" if row["reason"] else f"{row['lower'] / row['claimed']:.0%}"


if __name__ == "__main__":
    main()
