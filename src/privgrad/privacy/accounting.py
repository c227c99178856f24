"""epsilon = f(event, delta, relation): dp-accounting, with a grid chosen so that no input takes minutes or gigabytes.

Why epsilon is an upper bound: dp-accounting's PLD is discretised by connect-the-dots, which dominates the true privacy
loss for EVERY grid width, and mass cut from a tail is added to delta; a coarser grid can only raise epsilon. RDP
converts at each order on its own and takes the smallest; an order that did not converge is left out, which can only
raise epsilon. What PLD's Fourier transforms round away of delta is taken off the delta that is asked for (`_rounding`); other
floating point rounding inside both is not covered, and the certificate says so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any

import attr
import dp_accounting
import numpy
from absl import logging as absl_logging
from dp_accounting import DpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon

from privgrad.errors import PrivgradError, check_number
from privgrad.privacy import mixed
from privgrad.privacy.events import Accountant, MixedGaussianDpEvent


class Precision(Enum):
    """The grid of the privacy loss distribution, as a share of the loss itself. Every choice is an upper bound."""

    FINE = 1e-5
    COARSE = 2e-4
    ROUGH = 5e-4
    """For guesses only: of mixing it overstates a few hundredths."""


MOST_STEPS = 10**9
MOST_STEPS_BY_PLD = 10**6
"""To size its answer dp-accounting raises the points of one loss to the number of steps, digit for digit: minutes beyond this."""
_COARSEST_GRID = 1e-2
_POINTS = {Precision.FINE: 1e6, Precision.COARSE: 5e4, Precision.ROUGH: 2e4}
_LARGEST_MULTIPLIER = 1e9
_SMALLEST_RATE = 1e-12
_SMALLEST_MULTIPLIER = 1e-4
"""Less noise than this protects nobody (epsilon of one step is far above `_LARGEST_EPSILON`): reported as infinite."""
_ROUNDING = 2e-15
"""Of delta, for each step that PLD composes by Fourier transforms (`_rounding`)."""
_LARGEST_EPSILON = 1e6
"""Above this a guarantee says nothing; it is reported as infinite, which is an upper bound too."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting warns about each order that it leaves out; leaving it out is safe and nothing to act on."""
    before = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(before)


@dataclass(frozen=True)
class _Atom:
    """One kind of sampled Gaussian inside an event, and how often it occurs."""

    rate: float
    multiplier: float
    count: int


def _atoms(event: DpEvent, count: int = 1) -> Iterator[_Atom]:
    if isinstance(event, dp_accounting.GaussianDpEvent):
        yield _Atom(1.0, event.noise_multiplier, count)
    elif isinstance(event, dp_accounting.PoissonSampledDpEvent):
        for atom in _atoms(event.event, count):
            yield replace(atom, rate=event.sampling_probability)
    elif isinstance(event, dp_accounting.TruncatedSubsampledGaussianDpEvent):
        # A truncated sample swaps the record for another: twice the distance at worst.
        yield _Atom(event.sampling_probability, event.noise_multiplier / 2, count)
    elif isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent):
        for atom in _atoms(event.event, count):
            yield replace(atom, rate=event.sample_size / event.source_dataset_size)
    elif isinstance(event, dp_accounting.SelfComposedDpEvent):
        yield from _atoms(event.event, event.count * count)
    elif isinstance(event, dp_accounting.ComposedDpEvent):
        for part in event.events:
            yield from _atoms(part, count)


def _parts(event: DpEvent) -> Iterator[DpEvent]:
    """The event and all events inside it."""
    yield event
    inside = (
        event.events if isinstance(event, dp_accounting.ComposedDpEvent) else [event.event] if _holds(event) else []
    )
    for part in inside:
        yield from _parts(part)


def _has(event: DpEvent, kind: type[DpEvent]) -> bool:
    return any(isinstance(part, kind) for part in _parts(event))


def _changed(event: DpEvent, change: Callable[[DpEvent], DpEvent]) -> DpEvent:
    """The event with `change` of every event inside it, from the inside out."""
    if isinstance(event, dp_accounting.ComposedDpEvent):
        event = dp_accounting.ComposedDpEvent(tuple(_changed(part, change) for part in event.events))
    elif _holds(event):
        event = attr.evolve(event, event=_changed(event.event, change))
    return change(event)


def _holds(event: DpEvent) -> bool:
    """Whether it is one event, sampled or repeated."""
    return isinstance(
        event,
        dp_accounting.SelfComposedDpEvent
        | dp_accounting.PoissonSampledDpEvent
        | dp_accounting.SampledWithoutReplacementDpEvent,
    )


def _bounded(event: DpEvent) -> DpEvent:
    """An absurdly large multiplier lowered, an absurdly small rate raised: that can only raise epsilon."""
    if isinstance(event, dp_accounting.GaussianDpEvent | dp_accounting.TruncatedSubsampledGaussianDpEvent):
        return attr.evolve(event, noise_multiplier=min(event.noise_multiplier, _LARGEST_MULTIPLIER))
    if isinstance(event, dp_accounting.PoissonSampledDpEvent):
        return attr.evolve(event, sampling_probability=max(event.sampling_probability, _SMALLEST_RATE))
    return event


def _unsampled(event: DpEvent) -> DpEvent:
    """As if every unit took part in every step of a sample without replacement: that can only raise epsilon."""
    return event.event if isinstance(event, dp_accounting.SampledWithoutReplacementDpEvent) else event


def _unmixed(event: DpEvent) -> DpEvent:
    """Without the uniform noise of mixing, which is post-processing: that can only raise epsilon."""
    if isinstance(event, MixedGaussianDpEvent):
        return dp_accounting.GaussianDpEvent(event.noise_multiplier)
    return event


def _largest_loss(atom: _Atom) -> float:
    """About the largest privacy loss of one sampled Gaussian whose probability is not negligible (10 sigma)."""
    full = 0.5 / atom.multiplier**2 + 10 / atom.multiplier
    return full if atom.rate == 1.0 else full + math.log(atom.rate + (1 - atom.rate) * math.exp(-full))


def _spread(atoms: Sequence[_Atom]) -> float:
    """About the standard deviation of the composed privacy loss where it is small: sqrt(T) q sqrt(e^(1/z^2) - 1)."""
    return math.sqrt(sum(atom.count * atom.rate**2 * math.expm1(min(1.0, atom.multiplier**-2)) for atom in atoms))


_ORDERS_WITHOUT_REPLACEMENT = (*range(2, 49), 56, 64, 80, 96, 128, 160, 192, 256)
"""Above 256 dp-accounting approximates this sampler by Stirling's formula; between whole orders it interpolates."""


def _rdp(event: DpEvent, delta: float, relation: NeighboringRelation) -> float:
    """epsilon, or 0 where dp-accounting cannot tell it."""
    orders = _ORDERS_WITHOUT_REPLACEMENT if _has(event, dp_accounting.SampledWithoutReplacementDpEvent) else None
    try:
        with _quiet(), numpy.errstate(all="ignore"):
            return float(RdpAccountant(orders, neighboring_relation=relation).compose(event).get_epsilon(delta))
    except (ArithmeticError, ValueError):  # the logarithm of a divergence that was lost in rounding
        return 0.0


def _guide(atoms: Sequence[_Atom], delta: float) -> float:
    """About the size of the answer."""
    poisson = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(atom.rate, dp_accounting.GaussianDpEvent(atom.multiplier)), atom.count
        )
        for atom in atoms
    ]
    found = _rdp(dp_accounting.ComposedDpEvent(tuple(poisson)), delta, NeighboringRelation.ADD_OR_REMOVE_ONE)
    return max(found, _spread(atoms))


def check_composable(count: int, accountant: Accountant) -> None:
    """Refuse more events than the accountant composes in reasonable time."""
    if accountant is Accountant.PLD and count > MOST_STEPS_BY_PLD:
        raise PrivgradError(
            f"more than {MOST_STEPS_BY_PLD:,} steps are too many for privacy loss distributions; use accountant = 'rdp', or "
            "fewer, larger steps"
        )


@lru_cache(maxsize=8)
def _pld(event: DpEvent, delta: float, relation: NeighboringRelation, precision: Precision) -> PLDAccountant | None:
    """A composed PLD whose grid follows the size of the answer (from RDP, only as a guide) and of one step's loss.

    None where the answer is beyond `_LARGEST_EPSILON`.
    """
    atoms = list(_atoms(event))
    check_composable(sum(atom.count for atom in atoms), Accountant.PLD)
    guide = _guide(atoms, delta)
    largest = max(_largest_loss(atom) for atom in atoms)
    if not max(guide, largest) <= _LARGEST_EPSILON:
        return None
    points = _POINTS[precision]
    grid = max(min(precision.value * guide, _COARSEST_GRID), guide / points, largest / points)
    for coarser in (1.0, 10.0, 100.0, 1e3):
        try:
            with numpy.errstate(all="ignore"):
                return PLDAccountant(relation, value_discretization_interval=coarser * grid).compose(event)
        except (ArithmeticError, IndexError, MemoryError, ValueError):
            continue  # where all of the loss is next to nothing, dp-accounting trips over its own truncation
    raise PrivgradError(
        "dp-accounting cannot compute this epsilon: its numbers are too far apart (steps, sampling rate, noise multiplier, delta)"
    )


def _rounding(event: DpEvent) -> float:
    """More of delta than a composed PLD can have lost by rounding.

    T steps are the T-th power of a transform of numbers that are at most 1 and wrong by a few units u = 1.1e-16: each number
    of the power by a few u T of itself. By Parseval's theorem and Cauchy-Schwarz the sum over all losses is wrong by at most a
    few u T sqrt(N / s), where N / s is the range in standard deviations (about 20). Seen at most: 1.5e-17 T against closed forms
    (10^4 to 10^6 Gaussian steps), 1e-16 T against transforms of sampled steps in extended precision, and 5e-14 in one sampled
    step, where nothing is transformed.
    """
    return _ROUNDING * (100 + sum(atom.count for atom in _atoms(event)))


def _by_pld(event: DpEvent, delta: float, relation: NeighboringRelation, precision: Precision) -> float:
    """epsilon at what rounding leaves of delta."""
    rounding = _rounding(event)
    if rounding > delta / 2:
        raise PrivgradError(
            f"delta = {delta:g} is too small for privacy loss distributions: rounding may take up to {rounding:.1g} of it in so "
            f"many steps; use a delta of at least {2.01 * rounding:.2g}, or accountant = 'rdp'"
        )
    composed = _pld(event, delta, relation, precision)
    return math.inf if composed is None else float(composed.get_epsilon(delta - rounding))


def _trivial(event: DpEvent) -> float | None:
    """0 or infinity for events that need no accountant (dp-accounting's PLD and RDP treat them alike)."""
    if isinstance(event, dp_accounting.NoOpDpEvent):
        return 0.0
    if isinstance(event, dp_accounting.NonPrivateDpEvent):
        return math.inf
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return _trivial(event.event)
    if isinstance(event, dp_accounting.ComposedDpEvent):
        parts = [_trivial(part) for part in event.events]
        if math.inf in parts:
            return math.inf
        if all(part == 0.0 for part in parts):
            return 0.0
    if any(atom.multiplier < _SMALLEST_MULTIPLIER for atom in _atoms(event)):
        return math.inf
    return None


def _mixed_rdp(event: DpEvent, tolerance: float, count: int = 1) -> numpy.ndarray[Any, Any] | None:
    """RDP at `mixed.ORDERS`; None where another event is part of it."""
    if isinstance(event, dp_accounting.NoOpDpEvent):
        return numpy.zeros(len(mixed.ORDERS))
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return _mixed_rdp(event.event, tolerance, event.count * count)
    if isinstance(event, dp_accounting.ComposedDpEvent):
        parts = [_mixed_rdp(part, tolerance, count) for part in event.events]
        known = [part for part in parts if part is not None]
        return sum(known, start=numpy.zeros(len(mixed.ORDERS))) if len(known) == len(parts) else None
    sampled = isinstance(event, dp_accounting.PoissonSampledDpEvent)
    rate, inner = (event.sampling_probability, event.event) if sampled else (1.0, event)
    if not isinstance(inner, MixedGaussianDpEvent):
        return None
    return count * mixed.rdp(rate, inner.noise_multiplier, inner.width, 1 / math.sqrt(inner.p), tolerance)


_TIGHTER_BY_PLD = 4.0
"""PLD is never this many times below RDP; so much above another bound, it need not be asked."""


def _mixed_epsilon(
    event: DpEvent, delta: float, relation: NeighboringRelation, accountant: Accountant, precision: Precision
) -> float:
    """The smaller of two upper bounds: with the uniform noise by its own accountant, and without it."""
    plain = _changed(event, _unmixed)
    divergences = _mixed_rdp(event, mixed.ROUGH if precision is Precision.ROUGH else mixed.FINE)
    if divergences is None:
        return epsilon(plain, delta, relation, accountant, precision)
    with numpy.errstate(all="ignore"):
        found = float(compute_epsilon([float(order) for order in mixed.ORDERS], divergences, delta)[0])
    if not found <= _LARGEST_EPSILON:
        found = math.inf
    if _trivial(plain) is not None or 0 < _TIGHTER_BY_PLD * found < _rdp(_changed(plain, _bounded), delta, relation):
        return found
    return min(found, epsilon(plain, delta, relation, accountant, precision))


@lru_cache(maxsize=256)
def epsilon(
    event: DpEvent,
    delta: float,
    relation: NeighboringRelation,
    accountant: Accountant = Accountant.PLD,
    precision: Precision = Precision.FINE,
) -> float:
    """The smallest epsilon that the accountant can prove for (epsilon, delta)-DP of `event`.

    Guarantee: an upper bound, for either accountant and either precision (module docstring). Infinite where there is none.

    Raises:
        PrivgradError: delta outside (0, 1), or so small that PLD's rounding is more than half of it.
    """
    check_number("delta", delta, above=0, below=1)
    if _has(event, MixedGaussianDpEvent):
        return _mixed_epsilon(event, delta, relation, accountant, precision)
    trivial = _trivial(event)
    if trivial is not None:
        return trivial
    event = _changed(event, _bounded)
    if accountant is Accountant.RDP:
        found = _rdp(event, delta, relation)
        if found > 0:
            return found
        # dp-accounting answers 0 where a divergence is lost in rounding. PLD, which rounds upwards, has the last word; for the
        # one sampler that it does not know, without amplification (the doubled distance is in the event already).
        if _has(event, dp_accounting.SampledWithoutReplacementDpEvent):
            event, relation = _changed(event, _unsampled), NeighboringRelation.REPLACE_SPECIAL
    return _by_pld(event, delta, relation, precision)


@lru_cache(maxsize=64)
def attack_success(
    event: DpEvent,
    delta: float,
    relation: NeighboringRelation,
    accountant: Accountant = Accountant.PLD,
    precision: Precision = Precision.FINE,
) -> float:
    """The largest chance that anyone guesses rightly whether one unit took part, when a fair coin decided it.

    That chance is (1 + TV) / 2, and the total variation distance TV is delta(epsilon = 0), for which PLD gives an upper
    bound; (epsilon, delta) itself gives TV <= (e^eps - 1 + 2 delta) / (e^eps + 1). The smaller of the two holds.
    """
    proven = epsilon(event, delta, relation, accountant, precision)
    event = _changed(event, _unmixed)  # the uniform noise is post-processing: an upper bound
    advantage = 1.0 if math.isinf(proven) else math.tanh(proven / 2) + 2 * delta / (math.exp(min(proven, 700)) + 1)
    if accountant is Accountant.PLD and _trivial(event) is None:
        event = _changed(event, _bounded)
        composed = _pld(event, delta, relation, precision)
        advantage = min(advantage, 1.0 if composed is None else float(composed.get_delta(0.0)) + _rounding(event))
    return min(1.0, (1 + advantage) / 2)
