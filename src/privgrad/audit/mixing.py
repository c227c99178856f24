"""The step audit of ModelMix: no Gaussian mechanism, so that it is attacked by its exact likelihood ratio (arXiv:2210.03843).

A step releases the clipped sum plus, in every coordinate, a Gaussian and a uniform. Attackers know both, and both worlds: those
of `worst.worst_pair`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from dp_accounting.rdp import compute_epsilon
from numpy.typing import NDArray
from torch import Tensor

from privgrad.audit.gaussian import clopper_pearson_lower
from privgrad.audit.step import linear_loss
from privgrad.audit.worst import Held, WorstPair, worst_pair
from privgrad.errors import PrivgradError, check_count
from privgrad.gradients.contract import Fold
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.mixing import CALIBRATE, ModelMix
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.states import ClippedSum, Consumer
from privgrad.privacy import mixed
from privgrad.privacy.events import MixedGaussianDpEvent
from privgrad.privacy.ledger import Ledger
from privgrad.training.progress import ProgressDisplay, Silent

Array = NDArray[numpy.float64]

DELTA = 1e-3
"""At which a single step of mixing is audited: smaller ones need more trials than anybody runs."""
_RATE = 0.5
_REHEARSALS, _MOST_REHEARSED = 20_000, 4_000_000
"""Draws from which the threshold is chosen, and how many numbers they may be in all."""


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
class Noise:
    """On every coordinate of the clipped sum: a Gaussian of standard deviation s and a uniform of this width."""

    s: float
    width: float


def claim_of(plan: Plan) -> MixedGaussianDpEvent:
    """What one step of the plan is charged as, with every unit in it.

    Raises:
        PrivgradError: a plan without mixing or noise, or whose width is not known yet.
    """
    if not isinstance(plan.mixing, ModelMix):
        raise PrivgradError("the plan has no mixing; audit it with audit.worst.audit_plan")
    if not plan.noise.multiplier:
        raise PrivgradError("the plan has no noise, so there is no claim to audit")
    if plan.mixing.width_ratio == CALIBRATE:
        raise PrivgradError("the plan's width follows from an epsilon; calibrate it before it is audited")
    event = worst_pair(plan).plan.step_event()
    if not isinstance(event, MixedGaussianDpEvent):
        raise PrivgradError(f"a step of the plan is charged as {type(event).__name__}, which is no mixing")
    return event


def claimed_epsilon(plan: Plan, delta: float = DELTA) -> float:
    """Of one step with every unit in it."""
    claim = claim_of(plan)
    found = mixed.rdp(1.0, claim.noise_multiplier, claim.width, 1 / math.sqrt(claim.p))
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

    trials: in each of the two worlds. delta: at which both epsilons are stated. width: of the uniform on the sum, as the
    attacker believes it to be (the plan's by default).

    Guarantee (of the audit): `epsilon_lower` exceeds the true epsilon at delta with a chance of at most 1 - confidence.
    """
    check_count("trials", trials)
    claimed = claimed_epsilon(plan, delta)
    display = Silent() if progress is None else progress
    attack = _Attack(worst_pair(plan), trials, width)
    at = _threshold(attack.shift, attack.noise, delta)
    rounds = -(-trials // int(attack.through.sum()))
    display.start(0, 2 * rounds)
    found: list[list[Tensor]] = [[], []]
    try:
        for world, rows in enumerate((attack.pair.inside, attack.pair.outside)):
            for number in range(1, rounds + 1):
                found[world].append(attack.scores(rows))
                display.step(world * rounds + number, "")
    finally:
        display.stop()
    inside, outside = (torch.cat(scores)[:trials].numpy() - at for scores in found)
    lower, tight = (_shown(inside, outside, 0.0, delta, level) for level in (confidence, 0.95))
    return MixingAudit(claimed, lower, tight, delta, confidence, trials, inside.tolist(), outside.tolist())


class _Attack:
    """The step that is attacked, and what the attacker knows: by how much each coordinate moves, and the noise on it.

    shift: [coordinates that move], of the first canary. through: [canaries], whom no mask keeps from the sum.
    """

    def __init__(self, pair: WorstPair, trials: int, width: float | None) -> None:
        plan, mixing = pair.plan, pair.plan.mixing
        assert isinstance(mixing, ModelMix)
        assert mixing.width_ratio != CALIBRATE
        self.pair = pair
        forced = dataclasses.replace(plan, steps=2 * trials)
        ledger = Ledger(forced.terms())
        self._runner = Held(forced, pair.model, linear_loss, OnePassEngine(), ledger, pair.public, apart=lambda: True)
        inside, outside = (
            self._runner.clipped_sum((rows,), Fold.identity(len(rows))) for rows in (pair.inside, pair.outside)
        )
        noise: Any = plan.noise
        believed = mixing.width_ratio * plan.divisor if width is None else width
        self.noise = Noise(max(noise.scales(inside).values()), believed)
        self._base = self._flat(outside)
        self._moved = self._flat(inside) - self._base
        length = torch.zeros(pair.canaries, dtype=torch.float64).index_add_(0, pair.of, self._moved.square())
        self.through = length > 0.999 * length.max()
        first = int(self.through.nonzero()[0])
        own = self._moved[pair.of == first]
        self.shift: Array = own[own != 0].numpy()
        if not len(self.shift):
            raise PrivgradError("the worst pair that was tried does not move this plan's step at all: nothing to audit")

    def scores(self, rows: Tensor) -> Tensor:
        """[canaries that the step lets through]: one step's log-likelihood ratios, from weights that are zero, and were."""
        self._runner.states = {**self._runner.states, "mixing": {}}
        release = self._runner.release((rows,), Fold.identity(len(rows)), rate=_RATE)
        if release.weights is None:
            raise PrivgradError("a plan with mixing released no weights")
        weights = torch.cat([release.weights[name].flatten() for name, _ in self._runner.model.named_parameters()])
        seen = -weights.double() * release.divisor / _RATE - self._base
        moves = self._moved != 0
        terms = torch.zeros_like(seen)
        terms[moves] = torch.from_numpy(_ratios(seen[moves].numpy(), self._moved[moves].numpy(), self.noise))
        return torch.zeros(self.pair.canaries, dtype=torch.float64).index_add_(0, self.pair.of, terms)[self.through]

    def _flat(self, sums: ClippedSum) -> Tensor:
        """A clipped sum as one vector of the model's coordinates."""
        slots = {
            slot: sums.values[slot] for part in sums.parts if part.consumer is Consumer.UPDATE for slot in part.slots
        }
        decoded = self._runner._encoding.decode(slots)
        names = [name for name, _ in self._runner.model.named_parameters()]
        return torch.cat([decoded[name].flatten() for name in names]).double()


def _ratios(seen: Array, shift: Array, noise: Noise) -> Array:
    """[..., coordinates]: log-likelihood of a sum where the canary moves it by `shift` over that where it does not."""
    if noise.width == 0:
        return (seen - shift / 2) * shift / noise.s**2
    inside = mixed._log_density(seen - shift, noise.s, noise.width)
    return inside - mixed._log_density(seen, noise.s, noise.width)


def _threshold(shift: Array, noise: Noise, delta: float) -> float:
    """Fixed beforehand, from draws of the two distributions and not from what is audited."""
    chance = numpy.random.default_rng(0)
    count = max(1000, min(_REHEARSALS, _MOST_REHEARSED // len(shift)))
    size = (count, len(shift))
    draws = chance.normal(0, noise.s, size) + noise.width * chance.uniform(-0.5, 0.5, size)
    inside, outside = (_ratios(sums, shift, noise).sum(1) for sums in (draws + shift, draws))
    chosen = numpy.quantile(inside, numpy.linspace(0.5, 0.99, 30))
    return float(max(chosen, key=lambda at: _shown(inside, outside, float(at), delta, 0.95)))


def _shown(inside: Array, outside: Array, at: float, delta: float, confidence: float) -> float:
    """log((TPR_lo - delta) / FPR_hi), 0 where that is negative."""
    tail = (1 - confidence) / 2
    hits = clopper_pearson_lower(int((inside > at).sum()), len(inside), tail)
    alarms = 1 - clopper_pearson_lower(int((outside <= at).sum()), len(outside), tail)
    return max(0.0, math.log(max(hits - delta, 1e-12) / alarms))
