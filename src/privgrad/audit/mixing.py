"""The step audit of ModelMix: no Gaussian mechanism, so that it is attacked by its exact likelihood ratio (arXiv:2210.03843).

A step releases the clipped sum plus, in every coordinate, a Gaussian and a uniform. The attacker knows both and both worlds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy
import torch
from dp_accounting.rdp import compute_epsilon
from numpy.typing import NDArray
from torch import Tensor

from privgrad.audit.gaussian import clopper_pearson_lower
from privgrad.audit.step import Direction, linear_loss
from privgrad.errors import PrivgradError, RefusedError, check_count
from privgrad.gradients.contract import Fold
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.clipping import CoordinateClipping, FlatClipping
from privgrad.mechanism.groups import RandomGroups
from privgrad.mechanism.mixing import CALIBRATE, ModelMix
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import FullBatch
from privgrad.mechanism.step import StepRunner
from privgrad.privacy import mixed
from privgrad.privacy.ledger import Ledger
from privgrad.privacy.sensitivity import Bound, presence_distance
from privgrad.training.progress import ProgressDisplay, Silent

Array = NDArray[numpy.float64]

DELTA = 1e-3
"""At which a single step of mixing is audited: smaller ones need more trials than anybody runs."""
_RATE = 0.5
_PULL = 1e3
_OTHERS = 24
_MOST_NUMBERS, _MOST_COORDINATES, _MOST_CANARIES = 6_000_000, 4096, 250
_REHEARSALS = 20_000


@dataclass(frozen=True)
class MixingAudit:
    """What one unsampled step claims and what an attack shows, as epsilon at `delta`.

    epsilon_lower: at `confidence`; epsilon_lower_95: at 95 %. inside, outside: the log-likelihood ratios of the two worlds, the
    threshold at 0.
    """

    epsilon_claimed: float
    epsilon_lower: float
    epsilon_lower_95: float
    delta: float
    confidence: float
    trials: int
    inside: Sequence[float] = field(repr=False, compare=False)
    outside: Sequence[float] = field(repr=False, compare=False)

    def at(self, confidence: float) -> float:
        """The lower bound on epsilon at another confidence."""
        return _shown(numpy.asarray(self.inside), numpy.asarray(self.outside), 0.0, self.delta, confidence)

    @property
    def holds(self) -> bool:
        """True where the attack shows no more than the plan claims."""
        return self.epsilon_lower <= self.epsilon_claimed


@dataclass(frozen=True)
class Shape:
    """Of the step's noise, on the clipped sum. shift: per coordinate, between the worlds; over `coordinates` of them.

    distance: R; s: of the Gaussian; width: of the uniform.
    """

    distance: float
    s: float
    width: float
    shift: float
    coordinates: int


def shape_of(plan: Plan) -> Shape:
    """From the plan's own numbers."""
    if not isinstance(plan.mixing, ModelMix) or not isinstance(plan.clipping, FlatClipping):
        raise PrivgradError("the plan has no mixing; audit it with audit.worst.audit_plan")
    if not plan.noise.multiplier:
        raise PrivgradError("the plan has no noise, so there is no claim to audit")
    if plan.mixing.width_ratio == CALIBRATE:
        raise PrivgradError("the plan's width follows from an epsilon; calibrate it before it is audited")
    distance = presence_distance(Bound.ball(plan.clipping.max_norm), grouped=plan.groups is not None)
    p = plan.clipping.p if isinstance(plan.clipping, CoordinateClipping) else 1.0
    coordinates = min(int(p), _MOST_COORDINATES)
    width = plan.mixing.width_ratio * plan.divisor
    return Shape(distance, plan.noise.multiplier * distance, width, distance / math.sqrt(p), coordinates)


def claimed_epsilon(plan: Plan, delta: float = DELTA) -> float:
    """Of one step with every unit in it."""
    shape = shape_of(plan)
    multiplier, width = shape.s / shape.distance, shape.width / shape.distance
    found = mixed.rdp(1.0, multiplier, width, shape.shift / shape.distance)
    return float(compute_epsilon([float(order) for order in mixed.ORDERS], found, delta)[0])


def audit_mixing(
    plan: Plan,
    *,
    trials: int = 100_000,
    delta: float = DELTA,
    confidence: float = 1 - 1e-6,
    width: float | None = None,
    progress: ProgressDisplay | None = None,
) -> MixingAudit:
    """Attack one step of a plan with mixing: both last weights are equal, where the uniform is narrowest.

    trials: in each of the two worlds. delta: at which both epsilons are stated. width: of the uniform, as the attacker
    believes it to be (the plan's by default).

    Guarantee (of the audit): `epsilon_lower` exceeds the true epsilon at delta with a chance of at most 1 - confidence.
    """
    check_count("trials", trials)
    if plan.compression is not None or plan.statistics is not None:
        raise RefusedError(
            "the audit of mixing knows plans without compression and statistics; leave them out of the plan"
        )
    believed = dataclasses.replace(shape_of(plan), width=shape_of(plan).width if width is None else width)
    at = _threshold(believed, delta)
    display = Silent() if progress is None else progress
    worlds = observed(plan, trials, display)
    inside, outside = (likelihood_ratio(sums, believed) - at for sums in worlds)
    lower, tight = (_shown(inside, outside, 0.0, delta, level) for level in (confidence, 0.95))
    claimed = claimed_epsilon(plan, delta)
    return MixingAudit(claimed, lower, tight, delta, confidence, trials, inside.tolist(), outside.tolist())


def observed(plan: Plan, trials: int, display: ProgressDisplay) -> tuple[Array, Array]:
    """[trials, coordinates] each, with and without the canary: what the released weights show of noise and shift."""
    shape = shape_of(plan)
    grouped = plan.groups is not None
    canaries = 1 if grouped else max(1, min(_MOST_CANARIES, int(math.sqrt(_MOST_NUMBERS / shape.coordinates))))
    dimension = canaries * shape.coordinates
    pulls = _PULL * torch.eye(canaries).repeat_interleave(shape.coordinates, dim=1)
    others = torch.full((_OTHERS, dimension), -5.0) if grouped else torch.zeros(1, dimension)
    inside = torch.cat([(len(others) if grouped else 1) * pulls, others])
    rounds = -(-trials // canaries)
    runner = _runner(plan, dimension, 2 * rounds, shape.width)
    # Groups: without the canary their sum is the opposite of what it is with it.
    base = -shape.shift / 2 if grouped else 0.0
    display.start(0, 2 * rounds)
    found: list[list[Array]] = [[], []]
    try:
        for world, rows in enumerate((inside, others)):
            for number in range(1, rounds + 1):
                found[world].append(_sum(runner, rows).reshape(canaries, -1) - base)
                display.step(world * rounds + number, "")
    finally:
        display.stop()
    first, second = (numpy.concatenate(sums)[:trials] for sums in found)
    return first, second


def _runner(plan: Plan, dimension: int, steps: int, width: float) -> StepRunner:
    """One group where there are groups: the width of the uniform on the sum stays what it is."""
    forced = dataclasses.replace(plan, sampling=FullBatch(divisor=plan.divisor), steps=steps)
    if isinstance(plan.groups, RandomGroups) and isinstance(plan.mixing, ModelMix):
        mixing = dataclasses.replace(plan.mixing, width_ratio=width)
        forced = dataclasses.replace(forced, groups=dataclasses.replace(plan.groups, count=1), mixing=mixing)
    return StepRunner(forced, Direction(dimension), linear_loss, OnePassEngine(), Ledger(forced.terms()))


def _sum(runner: StepRunner, rows: Tensor) -> Array:
    """One step from weights that are zero, and were: the noised sum as its release shows it."""
    runner.states = {**runner.states, "mixing": {}}
    release = runner.release((rows,), Fold.identity(len(rows)), rate=_RATE)
    if release.weights is None:
        raise PrivgradError("a plan with mixing released no weights")
    seen: Array = -release.weights["weight"].double().numpy() * release.divisor / _RATE
    return seen


def likelihood_ratio(sums: Array, shape: Shape) -> Array:
    """[trials]: log of the canary's presence over its absence, every coordinate moved by `shape.shift`."""
    if shape.width == 0:
        ratio: Array = ((sums - shape.shift / 2) * shape.shift / shape.s**2).sum(1)
        return ratio
    density = mixed._log_density
    together: Array = density(sums - shape.shift, shape.s, shape.width) - density(sums, shape.s, shape.width)
    return numpy.asarray(together.sum(1))


def _threshold(shape: Shape, delta: float) -> float:
    """Fixed beforehand, from draws of the two distributions and not from what is audited."""
    chance = numpy.random.default_rng(0)
    size = (_REHEARSALS, shape.coordinates)
    draws = chance.normal(0, shape.s, size) + shape.width * chance.uniform(-0.5, 0.5, size)
    inside, outside = likelihood_ratio(draws + shape.shift, shape), likelihood_ratio(draws, shape)
    chosen = numpy.quantile(inside, numpy.linspace(0.5, 0.99, 30))
    return float(max(chosen, key=lambda at: _shown(inside, outside, float(at), delta, 0.95)))


def _shown(inside: Array, outside: Array, at: float, delta: float, confidence: float) -> float:
    """log((TPR_lo - delta) / FPR_hi), 0 where that is negative."""
    tail = (1 - confidence) / 2
    hits = clopper_pearson_lower(int((inside > at).sum()), len(inside), tail)
    alarms = 1 - clopper_pearson_lower(int((outside <= at).sum()), len(outside), tail)
    return max(0.0, math.log(max(hits - delta, 1e-12) / alarms))
