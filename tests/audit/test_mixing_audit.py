"""ModelMix under attack, by its exact likelihood ratio: what one step releases against what its event promises."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from dp_accounting.rdp import compute_epsilon
from torch import Tensor, nn

import privgrad as pg
from privgrad.audit.gaussian import clopper_pearson_lower
from privgrad.mechanism.mixing import ModelMix
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.step import StepRunner
from privgrad.privacy import mixed
from tests.helpers import full_batch_plan, rows, runner

P, NORM, RATE = 100, 1.0, 0.5
MULTIPLIER, RATIO = 0.335, 0.0563
BLOCKS, ROUNDS = 250, 400
DELTA = 1e-3
WIDTH = RATIO * 200
"""Of the uniform on the clipped sum: the paper's, in units of s."""


def plan(**changes: object) -> Plan:
    return full_batch_plan(
        BLOCKS,
        steps=2 * ROUNDS,
        clipping=pg.CoordinateClipping(max_norm=NORM, p=float(P)),
        noise=pg.GaussianNoise(multiplier=MULTIPLIER),
        mixing=changes.pop("mixing", ModelMix(width_ratio=RATIO * 200 / BLOCKS)),
        **changes,
    )


class Blocks(nn.Module):
    """Row i's gradient lies in block i alone: many audits of one record each, side by side in one step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(BLOCKS, P))

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.weight * inputs).sum((1, 2))


def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0])


def observed(audited: Plan, present: bool) -> numpy.ndarray:
    """[trials, P]: noise and shift on the clipped sum, as the released weights show them. Both last weights are zero."""
    step: StepRunner = runner(audited, Blocks(), loss)
    places = torch.arange(BLOCKS)
    inputs = torch.zeros(BLOCKS, BLOCKS, P)
    inputs[places, places] = 1e3 if present else 0.0
    found = []
    for _ in range(ROUNDS):
        step.states = {**step.states, "mixing": {}}
        release = step.release(*rows(inputs), rate=RATE)
        assert release.weights is not None
        found.append(-release.weights["weight"].double().numpy() * audited.divisor / RATE)
    return numpy.concatenate(found)


def likelihood_ratio(sums: numpy.ndarray, width: float) -> numpy.ndarray:
    """[trials]: of the canary's presence, every coordinate moved by C / sqrt(p)."""
    shift, s = NORM / math.sqrt(P), MULTIPLIER * NORM
    if width == 0:
        return ((sums - shift / 2) * shift / s**2).sum(1)
    ratio: numpy.ndarray = mixed._log_density(sums - shift, s, width) - mixed._log_density(sums, s, width)
    return ratio.sum(1)


def threshold(width: float) -> float:
    """Fixed beforehand, from draws of the two distributions and not from what is audited."""
    chance = numpy.random.default_rng(0)
    draws = chance.normal(0, MULTIPLIER * NORM, (50_000, P)) + width * chance.uniform(-0.5, 0.5, (50_000, P))
    inside, outside = likelihood_ratio(draws + NORM / math.sqrt(P), width), likelihood_ratio(draws, width)
    chosen = numpy.quantile(inside, numpy.linspace(0.5, 0.99, 30))
    return float(max(chosen, key=lambda at: _shown(inside, outside, float(at), 0.95)))


def attack(audited: Plan, width: float, confidence: float) -> float:
    """The epsilon at DELTA that an attacker shows who knows the distribution."""
    inside, outside = (likelihood_ratio(observed(audited, present), width) for present in (True, False))
    return _shown(inside, outside, threshold(width), confidence)


def _shown(inside: numpy.ndarray, outside: numpy.ndarray, at: float, confidence: float) -> float:
    """log((TPR_lo - delta) / FPR_hi)."""
    tail = (1 - confidence) / 2
    hits = clopper_pearson_lower(int((inside > at).sum()), len(inside), tail)
    alarms = 1 - clopper_pearson_lower(int((outside <= at).sum()), len(outside), tail)
    return math.log(max(hits - DELTA, 1e-12) / alarms)


def claimed(width: float) -> float:
    """The epsilon of one step at DELTA, every unit in it."""
    found = mixed.rdp(1.0, MULTIPLIER, width, 1 / math.sqrt(P))
    return float(compute_epsilon([float(order) for order in mixed.ORDERS], found, DELTA)[0])


def test_the_attack_stays_below_the_claim_and_comes_near_it() -> None:
    torch.set_num_threads(1)
    assert plan().step_event().width == pytest.approx(WIDTH)
    inside, outside = (likelihood_ratio(observed(plan(), present), WIDTH) for present in (True, False))
    at = threshold(WIDTH)
    assert _shown(inside, outside, at, 1 - 1e-6) <= claimed(WIDTH)
    assert _shown(inside, outside, at, 0.95) >= 0.6 * claimed(WIDTH)


def test_weights_that_coincide_without_a_width_are_found() -> None:
    """No uniform where the last two weights are equal: what the push apart to tau is for."""

    class Coincident(ModelMix):
        def mix(self, state, weights, update, rate, source):  # type: ignore[no-untyped-def]
            mixed_weights, kept = super().mix(state, weights, update, rate, Still())
            return mixed_weights, kept

    class Still:
        def integers(self, count: int, high: int) -> Tensor:
            return torch.full((count,), high // 2)

    torch.set_num_threads(1)
    broken = plan(mixing=Coincident(width_ratio=RATIO * 200 / BLOCKS))
    assert attack(broken, 0.0, 1 - 1e-6) > claimed(WIDTH)
