"""epsilon = f(event, delta, relation): dp-accounting, with a grid chosen so that no input takes minutes or gigabytes.

Why epsilon is an upper bound: dp-accounting's PLD is discretised by connect-the-dots, which dominates the true privacy
loss for EVERY grid width, and mass cut from a tail is added to delta; a coarser grid can only raise epsilon. RDP
converts at each order on its own and takes the smallest; an order that did not converge is left out, which can only
raise epsilon. Floating point rounding inside both is not covered, and the certificate says so.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from enum import Enum
from functools import lru_cache

import dp_accounting
from absl import logging as absl_logging
from dp_accounting import DpEvent, NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from privgrad.errors import check_number
from privgrad.privacy.events import Accountant


class Precision(Enum):
    """The grid of the privacy loss distribution, as a share of the loss itself. Every choice is an upper bound."""

    FINE = 1e-5
    COARSE = 2e-4


_COARSEST_GRID = 1e-2
_POINTS = 1e6
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


def _atoms(event: DpEvent) -> Iterator[tuple[float, float]]:
    """(sampling probability, noise multiplier) of every Gaussian inside an event."""
    if isinstance(event, dp_accounting.GaussianDpEvent):
        yield 1.0, event.noise_multiplier
    elif isinstance(event, dp_accounting.PoissonSampledDpEvent):
        for _, multiplier in _atoms(event.event):
            yield event.sampling_probability, multiplier
    elif isinstance(event, dp_accounting.SelfComposedDpEvent):
        yield from _atoms(event.event)
    elif isinstance(event, dp_accounting.ComposedDpEvent):
        for part in event.events:
            yield from _atoms(part)


def _largest_loss(rate: float, multiplier: float) -> float:
    """About the largest privacy loss of one sampled Gaussian whose probability is not negligible (10 sigma)."""
    full = 0.5 / multiplier**2 + 10 / multiplier
    return full if rate == 1.0 else full + math.log(rate + (1 - rate) * math.exp(-full))


def _rdp(event: DpEvent, relation: NeighboringRelation) -> RdpAccountant:
    with _quiet():
        return RdpAccountant(neighboring_relation=relation).compose(event)


def _pld(event: DpEvent, delta: float, relation: NeighboringRelation, precision: Precision) -> PLDAccountant | None:
    """A composed PLD whose grid follows the size of the answer (from RDP, only as a guide) and of one step's loss.

    None where the answer is beyond `_LARGEST_EPSILON`.
    """
    guide = float(_rdp(event, NeighboringRelation.ADD_OR_REMOVE_ONE).get_epsilon(delta))
    largest = max((_largest_loss(rate, multiplier) for rate, multiplier in _atoms(event)), default=1.0)
    if not max(guide, largest) <= _LARGEST_EPSILON:
        return None
    grid = max(min(precision.value * guide, _COARSEST_GRID), guide / _POINTS, largest / _POINTS)
    return PLDAccountant(relation, value_discretization_interval=grid).compose(event)


def _trivial(event: DpEvent) -> float | None:
    """0 or infinity for events that need no accountant (dp-accounting's PLD and RDP treat them alike)."""
    if isinstance(event, dp_accounting.NoOpDpEvent):
        return 0.0
    if isinstance(event, dp_accounting.NonPrivateDpEvent):
        return math.inf
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return _trivial(event.event)
    if isinstance(event, dp_accounting.ComposedDpEvent) and any(_trivial(part) == math.inf for part in event.events):
        return math.inf
    return None


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
        PrivgradError: delta outside (0, 1).
    """
    check_number("delta", delta, above=0, below=1)
    trivial = _trivial(event)
    if trivial is not None:
        return trivial
    if accountant is Accountant.RDP:
        return float(_rdp(event, relation).get_epsilon(delta))
    composed = _pld(event, delta, relation, precision)
    return math.inf if composed is None else float(composed.get_epsilon(delta))


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
    advantage = 1.0 if math.isinf(proven) else math.tanh(proven / 2) + 2 * delta / (math.exp(min(proven, 700)) + 1)
    if accountant is Accountant.PLD and _trivial(event) is None:
        composed = _pld(event, delta, relation, precision)
        advantage = min(advantage, 1.0 if composed is None else float(composed.get_delta(0.0)))
    return min(1.0, (1 + advantage) / 2)
